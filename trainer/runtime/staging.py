"""Keeps a user's own files when an exported folder is replaced."""

import shutil
from collections.abc import Callable
from pathlib import Path


def keep_others(folder: Path, work: Path, is_ours: Callable[[str], bool]) -> None:
    """Copies the files of `folder` that are not ours into `work`, at the same relative paths.

    A file that `work` already has is not overwritten.
    """
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        if file.is_dir() or is_ours(path.as_posix()) or (work / path).exists():
            continue
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, work / path, follow_symlinks=False)
