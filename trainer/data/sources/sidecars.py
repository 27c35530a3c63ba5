"""Reads the captions in files next to images: a.txt, a.caption or a.json, or a.jpg.txt and so on."""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from halfbyte.quant.files.regular import Opener, open_regular
from halfbyte.trainer.data.archives.columns import CAPTION_COLUMNS
from halfbyte.trainer.data.records.problems import Problems
from halfbyte.trainer.data.sources.captions import (
    MOST_CAPTIONS,
    UNREADABLE,
    OwnCaptions,
    agreed,
    captions_of,
    read_text,
)
from halfbyte.trainer.wording import in_prose, printable, shown

log = logging.getLogger(__name__)

_TEXT = (".txt", ".caption")
_JSON = ".json"
SIDECAR_SUFFIXES = (*_TEXT, _JSON)


def add_sidecar_captions(
    files: Iterable[Path],
    pictures: Sequence[Path],
    captions: Mapping[Path, OwnCaptions],
    problems: Problems,
    *,
    lines: bool,
    opener: Opener = open_regular,
) -> dict[Path, OwnCaptions]:
    """Returns the captions of images from tables, `captions`, with those from files next to the images.

    Args:
        lines: each line of a text file is a caption of its own.
    """
    sidecars: defaultdict[Path, list[Path]] = defaultdict(list)
    for file in files:
        if file.suffix.lower() in SIDECAR_SUFFIXES:
            sidecars[file.with_suffix("")].append(file)
    merged = dict(captions)
    ignored: list[str] = []
    used: set[Path] = set()
    for picture in pictures:
        own = [*sidecars.get(picture.with_suffix(""), ()), *sidecars.get(picture, ())]
        used.update(own)
        read = (_read(file, problems, ignored, opener, lines=lines) for file in own)
        found = [one for one in read if one is not None]
        if picture in captions:
            found.insert(0, captions[picture])
        if found:
            merged[picture] = agreed(picture, found, problems)
    if ignored:
        more = f", and {len(ignored) - 1} more" if len(ignored) > 1 else ""
        log.warning("JSON files without captions are ignored: %s%s", ignored[0], more)
    unused = [file for own in sidecars.values() for file in own if file not in used]
    _warn_of_unused([file for file in unused if file.suffix.lower() in _TEXT], used)
    return merged


def _warn_of_unused(unused: Sequence[Path], used: set[Path]) -> None:
    if unused and used:
        log.warning(
            "%d caption files (.txt or .caption) belong to no image and are ignored, the first is %s",
            len(unused),
            printable(unused[0]),
        )


def _read(
    file: Path, problems: Problems, ignored: list[str], opener: Opener, *, lines: bool
) -> OwnCaptions | None:
    """Returns the captions in a file; None if it is a JSON file about other things, which `ignored` gets."""
    text = read_text(file, problems, opener)
    if text is None:
        return OwnCaptions(str(file), UNREADABLE, file.name)
    if file.suffix.lower() == _JSON:
        return _from_json(file, text, problems, ignored)
    stripped = (line.strip() for line in text.splitlines()) if lines else (text.strip(),)
    texts = tuple(caption for caption in stripped if caption)
    if len(texts) > MOST_CAPTIONS:
        problems.add(
            file, f"has {len(texts):,} captions, expected at most {MOST_CAPTIONS:,} for an image; remove some"
        )
    return OwnCaptions(str(file), texts, file.name)


def _from_json(file: Path, text: str, problems: Problems, ignored: list[str]) -> OwnCaptions | None:
    unreadable = OwnCaptions(str(file), UNREADABLE, file.name)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        problems.add(f"{file}:{error.lineno}", f"not valid JSON: {error.msg} at column {error.colno}")
        return unreadable
    except (ValueError, RecursionError) as error:  # thousands of digits or nested brackets
        problems.add(file, f"not usable JSON: {error}")
        return unreadable
    if isinstance(value, dict):
        if not any(column in value for column in CAPTION_COLUMNS):
            keys = ", ".join(map(shown, list(value)[:5])) or "none"
            ignored.append(f"{printable(file)} has no key {in_prose(CAPTION_COLUMNS)}, but {keys}")
            return None
        row = value
    else:
        row = {"caption": value}
    texts = captions_of(file, row, problems)
    return unreadable if texts is None else OwnCaptions(str(file), texts, file.name)
