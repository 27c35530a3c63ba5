"""Recognizes images that are not for training: masks, thumbnails, deleted files and other trainers' caches."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from halfbyte.trainer.wording import printable

# Folders that operating systems, network drives and other trainers write.
_BINS = ("$recycle.bin", "#recycle", "@recycle", "recycler")
_THUMBNAILS = ("@eadir", "__macosx")
_CACHES = ("_latent_cache", "_t_e_cache", "_clip_vision_cache")
_SYSTEM = ("system volume information", "lost+found")

# Names of images that belong to another image, whether it exists or not.
_NAMES = (
    (re.compile(r"(\.mask|-masklabel)$", re.IGNORECASE), "masks"),
    (re.compile(r"-condlabel$", re.IGNORECASE), "control images"),
    (re.compile(r"\.ref\d+$", re.IGNORECASE), "reference images"),
)
_MASK_NAME = re.compile(r"[-_]mask$", re.IGNORECASE)
_FOLDERS = {"mask": "masks", "masks": "masks", "control": "control images", "controls": "control images"}


DAMAGED = "damaged images"
"""The reason for images that data.on_bad_image: skip leaves out."""


class LeftOut:
    """Collects the images below a folder that are not trained on, with the reason for each."""

    def __init__(self) -> None:
        """Starts with none."""
        self.reasons: dict[Path | str, str] = {}
        self._many: dict[
            str, tuple[str, int]
        ] = {}  # by reason: the first and the number of images in tar files

    def add(self, picture: Path | str, reason: str) -> None:
        """Adds an image, or a row of a table with its number; `reason` is a plural noun."""
        self.reasons[picture] = reason

    def add_groups(self, groups: Iterable[tuple[str, str, int]]) -> None:
        """Adds images of a tar file that are left out: for each reason the first of them and their number."""
        for reason, first, count in groups:
            known, before = self._many.get(reason, (first, 0))
            self._many[reason] = known, before + count

    def of(self, reason: str) -> list[str]:
        """Returns the images that were left out for one reason."""
        return [str(picture) for picture, own in self.reasons.items() if own == reason]

    def groups(self) -> list[tuple[str, str, int]]:
        """Returns each reason with the first image and the number of images."""
        found = dict(self._many)
        for picture, reason in self.reasons.items():
            first, count = found.get(reason, (str(picture), 0))
            found[reason] = first, count + 1
        return [(reason, first, count) for reason, (first, count) in found.items()]

    def describe(self, root: Path) -> str:
        """Returns the number of images for each reason with the first of them; empty if there are none."""
        return ", ".join(
            f"{reason}: {count} ({printable(os.path.relpath(first, root))}{', ...' if count > 1 else ''})"
            for reason, first, count in self.groups()
        )


def foreign_folder(name: str) -> str | None:
    """Returns what is in a folder of an operating system or another trainer; None for other folders."""
    name = name.lower()
    if name in _BINS or name.startswith(".trash"):
        return "deleted files"
    if name in _THUMBNAILS:
        return "thumbnails"
    if name in _SYSTEM:
        return "system files"
    return "caches" if name in _CACHES else None


def pictures_in(folder: Path, suffixes: Sequence[str]) -> Iterable[Path]:
    """Yields the images in a folder that is left out. What cannot be read does not matter."""
    for inner, _, names in os.walk(folder):
        yield from (Path(inner) / name for name in sorted(names) if name.lower().endswith(tuple(suffixes)))


def without_foreign(pictures: Sequence[Path], has_caption: set[Path], left_out: LeftOut) -> list[Path]:
    """Returns the images to train on; adds the others to `left_out`.

    Args:
        has_caption: images, without their suffix, that have a caption file. A mask has none.
    """
    stems = {picture.with_suffix("") for picture in pictures}
    trained = []
    for picture in pictures:
        reason = _reason(picture, stems, has_caption)
        if reason is None:
            trained.append(picture)
        else:
            left_out.add(picture, reason)
    return trained


def _reason(picture: Path, stems: set[Path], has_caption: set[Path]) -> str | None:
    for pattern, reason in _NAMES:
        if pattern.search(picture.stem):
            return reason
    if picture.with_suffix("") in has_caption or picture in has_caption:
        return None
    folder = picture.parent
    if _MASK_NAME.search(picture.stem) and folder / _MASK_NAME.sub("", picture.stem) in stems:
        return "masks"
    if folder.name.lower() in _FOLDERS and folder.parent / picture.stem in stems:
        return _FOLDERS[folder.name.lower()]
    return None
