"""Exchanges two folders in one operation, so that there is no moment without either of them."""

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

_AT_FDCWD = -100  # "relative to the current folder", from fcntl.h
_RENAME_EXCHANGE = 2  # from linux/fs.h
# The kernel or the filesystem does not know the operation, for example NFS.
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two existing files or folders of one filesystem.

    Returns False, and changes nothing, if the system or the filesystem cannot do that. Raises OSError.
    """
    if _renameat2 is None:
        return False
    paths = (os.fsencode(one), os.fsencode(other))
    if _renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _find() -> Callable[[int, bytes, int, bytes, int], int] | None:
    """Returns Linux's renameat2; None on other systems, whose C library lacks it."""
    try:
        found = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return None
    found.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    found.restype = ctypes.c_int
    return found  # type: ignore[no-any-return]


_renameat2 = _find()
