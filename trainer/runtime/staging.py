"""Keeps the files of users when a folder is replaced."""

import shutil
from collections.abc import Callable
from pathlib import Path


def keep_others(folder: Path, work: Path, is_ours: Callable[[str], bool]) -> None:
    """Copies into `work` the files of `folder` that are not ours, by their paths in it, and that `work` has not."""
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        if file.is_dir() or is_ours(path.as_posix()) or (work / path).exists():
            continue
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, work / path, follow_symlinks=False)
