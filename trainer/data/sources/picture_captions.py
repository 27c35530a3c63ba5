"""Finds the captions of a folder's images, in tables and in files next to the images, and reports what is missing."""

import difflib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from halfbyte.trainer.data.pictures.decode import PICTURE_SUFFIXES
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.captions import METADATA_NAMES, Problems, read_metadata
from halfbyte.trainer.data.sources.left_out import LeftOut, without_foreign
from halfbyte.trainer.data.sources.sidecars import SIDECAR_SUFFIXES, OwnCaptions, add_sidecar_captions
from halfbyte.trainer.wording import printable, shown

log = logging.getLogger(__name__)

_HINTS = 10  # similar file names are suggested only for this many missing images, because the search is slow
_REPEATS = re.compile(r"\d+_\D")  # 10_sks dog


def picture_captions(
    root: Path,
    files: list[Path],
    pictures: list[Path],
    style: CaptionStyle,
    problems: Problems,
    left_out: LeftOut,
) -> dict[Path, tuple[str, ...]]:
    """Returns the captions of the images that are for training, in their order.

    Args:
        files: all files below `root`. pictures: those of them that are images.
        left_out: gets the images that are not for training.
    """
    captions = _metadata_captions(root, files, pictures, problems)
    with_caption = {file.with_suffix("") for file in files if file.suffix.lower() in SIDECAR_SUFFIXES}
    trained = without_foreign(pictures, with_caption | set(captions), left_out)
    if pictures and not trained:
        problems.add(root, f"all images are left out: {left_out.describe(root)}")
    captions = add_sidecar_captions(files, trained, captions, problems, lines=style.lines)
    found: dict[Path, tuple[str, ...]] = {}
    for picture in trained:
        own = captions.get(picture)
        _check(picture, own, style, problems)
        found[picture] = () if own is None else own.texts
    _warn_of_repeats(root, found)
    _warn_of_bare(found, style)
    return found


def _check(picture: Path, own: OwnCaptions | None, style: CaptionStyle, problems: Problems) -> None:
    """Adds a problem if an image has no caption, or one that cannot be used."""
    if own is None and not style.gives_text:
        problems.add(
            picture,
            f"has no caption; add {picture.with_suffix('.txt').name} next to it or a row in"
            f" {' or '.join(METADATA_NAMES)}, or set {style.setting}.caption_prefix",
        )
    elif own is not None and not own.texts and not style.gives_text:
        problems.add(picture, f"has an empty caption; write one, or set {style.setting}.caption_prefix")
    elif own is not None:
        for text in own.texts:
            style.check_own(own.where, text, problems)


def _warn_of_bare(found: dict[Path, tuple[str, ...]], style: CaptionStyle) -> None:
    """Logs a warning if only some images have a caption of their own."""
    bare = [picture for picture, texts in found.items() if not texts]
    if style.gives_text and 0 < len(bare) < len(found):
        log.warning(
            "%d of %d images have no caption of their own and are trained with %s only, the first is %s",
            len(bare),
            len(found),
            shown(style.finished("")),
            printable(bare[0]),
        )


def _warn_of_repeats(root: Path, pictures: Iterable[Path]) -> None:
    """Logs a warning for folders below `root` that are named as kohya's scripts expect, with the repeats in front."""
    folders = sorted({picture.parent for picture in pictures} - {root})
    named = [folder for folder in folders if _REPEATS.match(folder.name)]
    if named:
        log.warning(
            "the numbers in front of folders such as %s are not used as repeats; list each folder in data.sets, with"
            " its own repeats",
            printable(named[0]),
        )


def _metadata_captions(
    root: Path, files: list[Path], pictures: list[Path], problems: Problems
) -> dict[Path, OwnCaptions]:
    known = set(pictures)
    captions: dict[Path, OwnCaptions] = {}
    first_row: dict[Path, str] = {}
    for file in (file for file in files if file.name in METADATA_NAMES):
        other = file.with_name(METADATA_NAMES[0])
        if file.name != other.name and other in files:
            problems.add(file, f"{other.name} is in the same folder; keep only one of them")
            continue
        for row in read_metadata(file, problems):
            picture = Path(os.path.normpath(file.parent / row.file_name))
            if picture not in known:
                # Finding similar names is slow, so only the first few missing images get a suggestion.
                candidates = pictures if len(problems.lines) < _HINTS else []
                problems.add(row.where, _missing(root, file.parent, row.file_name, picture, candidates))
            elif picture in first_row:
                problems.add(
                    row.where,
                    f"{shown(row.file_name)} already has a row at {first_row[picture]}; keep one of them",
                )
            else:
                first_row[picture] = row.where
                captions[picture] = OwnCaptions(row.where, row.texts, file.name)
    return captions


def _missing(root: Path, folder: Path, name: str, picture: Path, candidates: list[Path]) -> str:
    if not picture.is_relative_to(root):
        return f"names {shown(name)}, which is outside {root}; move the image inside"
    if os.path.lexists(picture):  # Path.exists raises OSError for a name that is too long
        return f"names {shown(name)}, which is not an image; accepted: {', '.join(PICTURE_SUFFIXES)}"
    names = [os.path.relpath(other, folder) for other in candidates]
    folded = {other.casefold(): other for other in names}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    hint = f"; did you mean {shown(folded[close[0]])}?" if close else ""
    return f"names a missing image, {shown(name)}{hint}"
