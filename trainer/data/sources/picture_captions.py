"""Finds the captions of a folder's images, in tables and in files next to the images, and reports what is missing."""

import difflib
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.quant.files.regular import Opener, open_regular
from halfbyte.trainer.data.pictures.decode import PICTURE_SUFFIXES
from halfbyte.trainer.data.records.problems import Problems
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.captions import METADATA_NAMES, OwnCaptions, read_metadata
from halfbyte.trainer.data.sources.left_out import LeftOut, without_foreign
from halfbyte.trainer.data.sources.meta import is_meta, merged_meta
from halfbyte.trainer.data.sources.sidecars import SIDECAR_SUFFIXES, add_sidecar_captions
from halfbyte.trainer.wording import printable, shown

log = logging.getLogger(__name__)

_HINTS = 10  # similar file names are suggested only for this many missing images, because the search is slow
_REPEATS = re.compile(r"\d+_\D")  # 10_sks dog


@dataclass(frozen=True)
class Listing:
    """The files of a folder, or of a tar file as if it were a folder."""

    root: Path
    files: Sequence[Path]  # all files below `root`, sorted
    pictures: Sequence[Path]  # those of them that are images
    opener: Opener = open_regular


def picture_captions(
    listing: Listing, style: CaptionStyle, problems: Problems, left_out: LeftOut
) -> dict[Path, tuple[str, ...]]:
    """Returns the captions of the images that are for training, in their order, and reports what is missing.

    left_out: gets the images that are not for training.
    """
    own = own_captions(listing, problems, left_out, lines=style.lines)
    found: dict[Path, tuple[str, ...]] = {}
    for picture, captions in own.items():
        _check(picture, captions, style, problems)
        found[picture] = () if captions is None else captions.texts
    _warn_of_repeats(listing.root, found)
    _warn_of_bare(found, style)
    return found


def own_captions(
    listing: Listing, problems: Problems, left_out: LeftOut, *, lines: bool
) -> dict[Path, OwnCaptions | None]:
    """Returns the captions of the images that are for training, in their order; None for an image without.

    Args:
        left_out: gets the images that are not for training.
        lines: each line of a text file is a caption.
    """
    files, pictures = listing.files, listing.pictures
    captions = _metadata_captions(listing, problems)
    with_caption = {file.with_suffix("") for file in files if file.suffix.lower() in SIDECAR_SUFFIXES}
    trained = without_foreign(pictures, with_caption | set(captions), left_out)
    if pictures and not trained:
        problems.add(listing.root, f"all images are left out: {left_out.describe(listing.root)}")
    tables = {file for file in files if is_meta(listing.root, file, pictures)}
    sidecars = [file for file in files if file not in tables] if tables else files
    captions = add_sidecar_captions(sidecars, trained, captions, problems, lines=lines, opener=listing.opener)
    return {picture: captions.get(picture) for picture in trained}


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


def _metadata_captions(listing: Listing, problems: Problems) -> dict[Path, OwnCaptions]:
    files, pictures = listing.files, listing.pictures
    known = set(pictures)
    captions: dict[Path, OwnCaptions] = {}
    first_row: dict[Path, str] = {}
    names = set(files)
    for file in (file for file in files if file.name in METADATA_NAMES):
        other = file.with_name(METADATA_NAMES[0])
        if file.name != other.name and other in names:
            problems.add(file, f"{other.name} is in the same folder; keep only one of them")
            continue
        for row in read_metadata(file, problems, listing.opener):
            picture = Path(os.path.normpath(file.parent / row.file_name))
            if picture not in known:
                # Finding similar names is slow, so only the first few missing images get a suggestion.
                candidates = pictures if len(problems.lines) < _HINTS else []
                problems.add(
                    row.where, _missing(listing.root, file.parent, row.file_name, picture, candidates)
                )
            elif picture in first_row:
                problems.add(
                    row.where,
                    f"{shown(row.file_name)} already has a row at {first_row[picture]}; keep one of them",
                )
            else:
                first_row[picture] = row.where
                captions[picture] = OwnCaptions(row.where, row.texts, file.name)
    return merged_meta(listing.root, files, pictures, captions, problems, listing.opener)


def _missing(root: Path, folder: Path, name: str, picture: Path, candidates: Sequence[Path]) -> str:
    if not picture.is_relative_to(root):
        return f"names {shown(name)}, which is outside {root}; move the image inside"
    if os.path.lexists(picture):  # Path.exists raises OSError for a name that is too long
        return f"names {shown(name)}, which is not an image; accepted: {', '.join(PICTURE_SUFFIXES)}"
    names = [os.path.relpath(other, folder) for other in candidates]
    folded = {other.casefold(): other for other in names}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    hint = f"; did you mean {shown(folded[close[0]])}?" if close else ""
    return f"names a missing image, {shown(name)}{hint}"
