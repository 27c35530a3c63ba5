"""Keeps a user's own files when an exported folder is replaced."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def keep_others(folder: Path, work: Path, is_ours: Callable[[str], bool]) -> None:
    """Puts the files of `folder` that are not ours into `work` as well, at the same relative paths.

    A file that `work` already has is not overwritten. Files are linked where the filesystem allows it, so they stay
    the same files: of any size, without a moment in which they are half copied. Links and empty folders are kept.
    """
    for path in sorted(folder.rglob("*")):
        kept = work / path.relative_to(folder)
        if is_ours(path.relative_to(folder).as_posix()) or os.path.lexists(kept):
            continue
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                kept.mkdir(parents=True)
            continue
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, kept, follow_symlinks=False)
        except OSError:  # for example exFAT has no links
            shutil.copy2(path, kept, follow_symlinks=False)
