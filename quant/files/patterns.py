"""Expands patterns of file names, such as shards/{000..012}.tar or train-*.parquet."""

import glob
import re
from collections.abc import Iterator
from pathlib import Path

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_FILES = 1_000_000


def is_pattern(path: Path) -> bool:
    """Returns True if a path is a pattern of several files rather than the name of one that exists."""
    return bool(re.search(r"[*?{\[]", str(path))) and not path.exists()


def matching_files(pattern: Path) -> list[Path]:
    """Returns the files that a pattern names: those of {000..012} and {a,b} in order, those of * and ? sorted.

    Raises:
        ValueError: a range is too large, a file of a range is missing, or none matches.
    """
    found: list[Path] = []
    for name in _expanded(str(pattern)):
        matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not matches or not Path(matches[0]).exists():
            raise ValueError(f"there is no file {name}")
        found += map(Path, matches)
        if len(found) > _MOST_FILES:
            raise ValueError(f"it names more than {_MOST_FILES:,} files")
    return list(dict.fromkeys(found))


def base_folder(pattern: Path) -> Path:
    """Returns the innermost folder that holds all files of a pattern."""
    inner = [number for number, part in enumerate(pattern.parts) if re.search(r"[*?{\[]", part)]
    return Path(*pattern.parts[: inner[0]]) if inner else pattern.parent


def _expanded(text: str) -> Iterator[str]:
    """Yields a pattern with its first braces replaced by each of their values, and so on."""
    found = _BRACES.search(text)
    if found is None:
        yield text
        return
    span = _RANGE.fullmatch(found[1])
    if span is None and "," not in found[1]:
        raise ValueError(f"got {found[0]}, expected a range such as {{000..012}}, or names with commas")
    if span is None:
        values: Iterator[str] | list[str] = found[1].split(",")
    else:
        first, last = int(span[1]), int(span[2])
        if not 0 <= last - first < _MOST_FILES:
            raise ValueError(f"got {found[0]}, expected a range from low to high")
        values = (f"{number:0{len(span[1])}}" for number in range(first, last + 1))
    for value in values:
        yield from _expanded(text[: found.start()] + value + text[found.end() :])
