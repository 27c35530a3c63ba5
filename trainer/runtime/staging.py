"""Folders that are written beside their places and put there when they are whole."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.quant.files.shards import flush


@contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, gone afterwards unless it has been put in its place."""
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def keep_others(folder: Path, work: Path, is_ours: Callable[[str], bool]) -> None:
    """Copies into `work` the files of `folder` that are not ours, by their paths in it, and that `work` has not."""
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        if file.is_dir() or is_ours(path.as_posix()) or (work / path).exists():
            continue
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, work / path, follow_symlinks=False)


def open_as_folder(folder: Path) -> None:
    """Lets those who may read and write in `folder` do so with its safetensors files, also in folders in it.

    safetensors gives what it writes to its owner alone, whatever the umask: ComfyUI under another account could not
    read it.
    """
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*.safetensors"):
        if not file.is_symlink():
            file.chmod(mode)


def put_in_place(work: Path, folder: Path) -> None:
    """Renames `work` to `folder`; what was there goes only when the new one stands."""
    open_as_folder(work)
    for file in work.rglob("*"):
        if not file.is_symlink():
            flush(file)
    replaced = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(work, folder)
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
