"""Reads and opens regular files only, within a size limit: a pipe or device would block or never end."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

Opener = Callable[[Path, int], BinaryIO]
"""Opens a file of at most so many bytes, like `open_regular`."""

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def require_regular(path: Path, limit: int) -> None:
    """Raises OSError if `path` is no regular file of at most `limit` bytes; symbolic links are followed.

    The error's `strerror` says what the path is, as for the errors of the operating system.
    """
    _require(os.stat(path), path, limit)


def open_regular(path: Path, limit: int) -> BinaryIO:
    """Opens a regular file of at most `limit` bytes for reading. Raises OSError like `require_regular`."""
    require_regular(path, limit)  # before opening, because opening a device may already act on it
    # Without O_NONBLOCK this would wait for a writer if a pipe took the file's place since.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require(os.fstat(descriptor), path, limit)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, limit: int) -> bytes:
    """Returns the content of a regular file of at most `limit` bytes. Raises OSError like `require_regular`."""
    with open_regular(path, limit) as file:
        data = file.read(limit + 1)
    if len(data) > limit:  # it has grown, or is a file of /proc, whose size is 0
        raise _too_large(path, len(data), limit)
    return data


def _require(status: os.stat_result, path: Path, limit: int) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        number = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL
        raise OSError(number, f"is {_KINDS.get(kind, 'of an unknown kind')}, expected a file", str(path))
    if status.st_size > limit:
        raise _too_large(path, status.st_size, limit)


def _too_large(path: Path, size: int, limit: int) -> OSError:
    return OSError(errno.EFBIG, f"has {size:,} bytes, expected at most {limit:,}", str(path))
