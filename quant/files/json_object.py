"""Reads small JSON files of a model's folder, which may be missing, damaged or not JSON at all."""

import json
from pathlib import Path
from typing import Any

# Indexes of the largest models have less than 1 MB.
_LARGEST = 64 * 2**20
_LFS = b"version https://git-lfs.github.com/spec/"
# Follows "not a ... file".
LFS_POINTER = (
    "but the pointer that Git LFS leaves in its place; run `git lfs pull` in the repository, or download it with"
    " `hf download`"
)


def read_object(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file that holds an object.

    Raises ValueError, naming the file, where it cannot be read, is too large, or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path}: missing")
    if is_lfs_pointer(path):
        raise ValueError(f"{path}: not a JSON file {LFS_POINTER}")
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{path}: larger than {_LARGEST // 2**20} MiB, which no configuration is")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: not a JSON file: nested too deeply") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def is_lfs_pointer(path: Path) -> bool:
    """Returns True if a file holds the few lines that Git leaves in place of a large file. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS
