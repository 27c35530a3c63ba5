"""Reads one JSON file with the captions and tags of a whole folder, as sd-scripts writes it.

It is called meta.json, or meta_cap.json and the like, and maps an image's path or name to its caption and its tags:
{"dogs/a": {"caption": "a dog", "tags": "dog, grass"}}.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from halfbyte.quant.files.regular import Opener
from halfbyte.trainer.data.records.problems import Problems
from halfbyte.trainer.data.sources.captions import UNREADABLE, OwnCaptions, agreed, captions_of
from halfbyte.trainer.wording import shown

_NAME = re.compile(r"meta(?:_\w+)?\.json", re.IGNORECASE | re.ASCII)
_BYTES = 2 * 10**9


def is_meta(root: Path, file: Path, pictures: Iterable[Path]) -> bool:
    """Returns True if a file has the captions of a whole folder, rather than those of an image of its name."""
    if file.parent != root or _NAME.fullmatch(file.name) is None:
        return False
    return not any(picture.parent == root and picture.stem == file.stem for picture in pictures)


def merged_meta(
    root: Path,
    files: Iterable[Path],
    pictures: Sequence[Path],
    captions: Mapping[Path, OwnCaptions],
    problems: Problems,
    opener: Opener,
) -> dict[Path, OwnCaptions]:
    """Returns captions of images from tables, `captions`, with those of meta.json.

    A caption and tags become one text, "caption, tags", as in sd-scripts. Keys that name no image are ignored.
    """
    merged = dict(captions)
    found = [file for file in files if is_meta(root, file, pictures)]
    for file in found[1:]:
        problems.add(file, f"{found[0].name} is in the same folder; keep only one of them")
    if not found:
        return merged
    for picture, own in _read(root, found[0], pictures, problems, opener).items():
        merged[picture] = agreed(picture, [merged[picture], own], problems) if picture in merged else own
    return merged


def _read(
    root: Path, file: Path, pictures: Sequence[Path], problems: Problems, opener: Opener
) -> dict[Path, OwnCaptions]:
    try:
        with opener(file, _BYTES) as stream:
            value = json.loads(stream.read().decode("utf-8-sig"))
    except OSError as error:
        problems.add(file, f"cannot be read: {error.strerror}")
        return {}
    except (ValueError, RecursionError) as error:
        problems.add(file, f"not usable JSON: {error}")
        return {}
    if not isinstance(value, dict):
        problems.add(file, f"got {shown(value)}, expected an object with a key for each image")
        return {}
    by_name: dict[str, Path] = {}
    for picture in pictures:
        relative = picture.relative_to(root)
        for name in (str(picture), str(picture.with_suffix("")), relative, relative.with_suffix("")):
            by_name[str(name)] = picture
    found: dict[Path, OwnCaptions] = {}
    for key, facts in value.items():
        named = by_name.get(str(Path(key)))
        if named is None:
            continue
        where = f"{file}: {shown(key)}"
        if not isinstance(facts, dict):
            problems.add(where, f"got {shown(facts)}, expected an object with caption or tags")
            found[named] = OwnCaptions(where, UNREADABLE, file.name)
            continue
        texts = _texts(where, facts, problems)
        found[named] = OwnCaptions(where, UNREADABLE if texts is None else texts, file.name)
    if value and not found:
        problems.add(
            file,
            f"names none of the images, but {shown(next(iter(value)))}; expected paths relative to its folder",
        )
    return found


def _texts(where: str, facts: Mapping[str, object], problems: Problems) -> tuple[str, ...] | None:
    """Returns the caption of an image with its tags; None after adding a problem."""
    captions, tags = (
        captions_of(where, facts, problems, (key,)) if key in facts else () for key in ("caption", "tags")
    )
    if captions is None or tags is None:
        return None
    listed = ", ".join(tags)
    return tuple(f"{text}, {listed}" if listed else text for text in captions) or (
        (listed,) if listed else ()
    )
