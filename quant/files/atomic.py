"""Writes files and folders atomically: they appear complete or not at all, even after a crash.

A process that is killed can leave work files behind. Their names contain `.halfbyte.`, or end with `.partial`, so
nobody else's files are mistaken for them. `recover` and `recover_all` remove them, and put back a folder that was
moved aside. In folders that several processes write into, `write_file` removes those of dead processes.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from halfbyte.quant.files.exchange import exchange

_WORK = ".{}.halfbyte.tmp"
_ASIDE = ".{}.halfbyte.old"
_LEFTOVER = re.compile(r"\.(.+)\.halfbyte\.(?:tmp|old)")
_PARTIAL = re.compile(r"\..{1,16}\.\d+\.[0-9a-f]{8}\.partial", re.DOTALL)
# Seconds without a change after which an unfinished file without a lock belongs to a dead process.
_ABANDONED = 60.0

_cleared: set[Path] = set()  # folders in which this process has removed abandoned files


def write_file(path: Path, content: str | bytes) -> None:
    """Replaces `path` by a file with this content, flushed to the disk; text is written as UTF-8.

    Several processes may write the same file at once; one of them wins. Raises OSError, and then leaves the
    old file unchanged. The first call for a folder also removes unfinished files of processes that were killed.
    """
    data = content.encode() if isinstance(content, str) else content
    with replaced(path) as file:
        file.write(data)


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file for reading and writing, which replaces `path` at the end, as `write_file` does.

    If the block raises, the old file stays.
    """
    if path.parent not in _cleared:
        _cleared.add(path.parent)
        _remove_abandoned(path.parent)
    # In the same folder, so on the same filesystem: a rename across filesystems is a copy, which is not
    # atomic.
    partial = path.with_name(f".{path.name[:16]}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("w+b") as file:
            # Held until the file has its name; it ends with this process, however that ends.
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def is_unfinished(name: str) -> bool:
    """Returns True for the name of a file that `write_file` has begun and not finished."""
    return _PARTIAL.fullmatch(name) is not None


def _remove_abandoned(folder: Path) -> None:
    """Removes the unfinished files in a folder that no process writes anymore; leaves those it may not touch."""
    with suppress(OSError):
        for name in filter(is_unfinished, os.listdir(folder)):
            with suppress(OSError), (folder / name).open("r+b") as file:
                if time.time() - os.fstat(file.fileno()).st_mtime > _ABANDONED:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its writer lives
                    (folder / name).unlink()


@contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder next to `folder`; deletes it at the end unless `put_in_place` has moved it.

    First recovers from an earlier process that was killed while it replaced `folder`.
    """
    make_folder(folder.parent)
    recover(folder)
    work = folder.with_name(_WORK.format(folder.name))
    work.mkdir()
    try:
        yield work
    finally:
        _remove(work)


def put_in_place(work: Path, folder: Path) -> None:
    """Flushes `work` to the disk, then renames it to `folder`; a previous `folder` is deleted after that.

    Where the filesystem can exchange two folders in one operation, `folder` exists at every moment. Elsewhere there
    is a moment without it, and a process killed then leaves the previous folder under another name, from which
    `recover` puts it back. Raises OSError; then `folder` is unchanged.
    """
    _share_weights(work)
    _flush_all(work)
    aside = folder.with_name(_ASIDE.format(folder.name))
    if os.path.lexists(folder) and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder; move it away", str(folder))
    if not os.path.lexists(folder):
        os.rename(work, folder)
        flush(folder.parent)
    elif exchange(work, folder):
        flush(folder.parent)
        _remove(work)  # the previous folder
    else:
        _remove(aside)
        os.rename(folder, aside)
        os.rename(work, folder)
        flush(folder.parent)
        _remove(aside)


def remove_folder(folder: Path) -> None:
    """Deletes a folder: to readers, it disappears at once. `recover` completes an interrupted deletion."""
    work = folder.with_name(_WORK.format(folder.name))
    _remove(work)
    os.rename(folder, work)
    _remove(work)


def recover(folder: Path) -> None:
    """Undoes what a killed process left of a replacement of `folder`: puts the previous folder back, if it is gone."""
    earlier = folder.with_name(f".{folder.name}.old")  # the name until version 0.2
    for aside in (folder.with_name(_ASIDE.format(folder.name)), earlier):
        if not os.path.lexists(folder) and aside.is_dir():
            os.rename(aside, folder)
            flush(folder.parent)
    # Not `earlier`: if `folder` exists, a user may have made it.
    _remove(folder.with_name(_WORK.format(folder.name)))
    _remove(folder.with_name(_ASIDE.format(folder.name)))


def recover_all(parent: Path) -> None:
    """Recovers every folder in `parent`, and deletes files that `write_file` could not finish.

    No other process may be writing into `parent`.
    """
    if not parent.is_dir():
        return
    names = sorted(entry.name for entry in parent.iterdir())
    for name in dict.fromkeys(found[1] for found in map(_LEFTOVER.fullmatch, names) if found):
        recover(parent / name)
    for name in filter(is_unfinished, names):
        (parent / name).unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, and flushes the entries of new ones to the disk."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    flush(folder.parent)


def flush(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_all(work: Path) -> None:
    for path in work.rglob("*"):
        # A file with a second name is a user's, see `keep_others`: it was not written now, and may not be readable.
        if not path.is_symlink() and (path.is_dir() or (path.is_file() and path.stat().st_nlink == 1)):
            flush(path)
    flush(work)


def _remove(folder: Path) -> None:
    """Deletes a work folder, or the link that was in its place."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _share_weights(folder: Path) -> None:
    """Gives safetensors files the read and write permissions of the folder.

    safetensors creates files that only their owner can read, regardless of the umask. ComfyUI under another
    account could not load them.
    """
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*.safetensors"):
        if not file.is_symlink() and file.stat().st_nlink == 1:
            file.chmod(mode)
