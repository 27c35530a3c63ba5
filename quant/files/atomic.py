"""Writes files and folders atomically: they appear complete or not at all, even after a crash."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_file(path: Path, content: str | bytes) -> None:
    """Replaces `path` by a file with this content, flushed to the disk; text is written as UTF-8.

    Several processes may write the same file at once; one of them wins. Raises OSError, and then leaves the
    old file unchanged.
    """
    data = content.encode() if isinstance(content, str) else content
    # In the same folder, so on the same filesystem: a rename across filesystems is a copy, which is not
    # atomic.
    partial = path.with_name(f".{path.name[:16]}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder next to `folder`; deletes it at the end unless `put_in_place` has moved it."""
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def put_in_place(work: Path, folder: Path) -> None:
    """Flushes `work` to the disk, then renames it to `folder`; a previous `folder` is deleted after that."""
    _share_weights(work)
    for path in work.rglob("*"):
        if not path.is_symlink():
            flush(path)
    flush(work)
    replaced = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(work, folder)
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def flush(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _share_weights(folder: Path) -> None:
    """Gives safetensors files the read and write permissions of the folder.

    safetensors creates files that only their owner can read, regardless of the umask. ComfyUI under another
    account could not load them.
    """
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*.safetensors"):
        if not file.is_symlink():
            file.chmod(mode)
