"""Finds the masks of a data set's images, and checks that they can be used."""

from collections.abc import Sequence
from pathlib import Path

from halfbyte.trainer.data.pictures.decode import DECODE_ERRORS, PICTURE_SUFFIXES
from halfbyte.trainer.data.pictures.mask import decode_mask
from halfbyte.trainer.data.records.problems import Problems
from halfbyte.trainer.data.records.sample import Place
from halfbyte.trainer.data.sources.folder import is_inside
from halfbyte.trainer.recipe.data_section import MaskedLoss

_MARK = ".mask"  # dog.mask.png is the mask of dog.jpg
_PROPORTION = 0.02  # the relative difference between the proportions of a mask and its image that is accepted


def mask_name(file: Path) -> Path | None:
    """Returns the path without suffix of the image that a file is the mask of, by its name; None for no mask."""
    name = file.with_suffix("")
    return name.with_suffix("") if name.suffix.lower() == _MARK else None


def mask_files(
    root: Path, pictures: Sequence[Path], settings: MaskedLoss, problems: Problems
) -> dict[Path, Path]:
    """Returns the mask files by the names of their images, relative to the data set at `root` and without suffix.

    Of several masks of one name, the first in the order of names counts. `pictures` are the images below `root`.
    """
    base = settings.folder or root
    found: dict[Path, Path] = {}
    files = pictures if settings.folder is None else settings.folder.rglob("*")
    for file in sorted(files, reverse=True):
        if file.suffix.lower() not in PICTURE_SUFFIXES:
            continue
        name = mask_name(file)
        if name is None and settings.folder is None:
            continue
        # The files of a data set have been checked before.
        if settings.folder is not None and not is_inside(base, file):
            problems.add(file, f"is a symbolic link to a file outside {base}; copy the file instead")
            continue
        found[(name or file.with_suffix("")).relative_to(base)] = file
    return found


def mask_problem(data: bytes, image: Place, size: tuple[int, int], *, alpha: bool) -> str | None:
    """Returns the reason why a mask cannot be used: its format, its proportions, or that it is black everywhere.

    Args:
        data: the mask's bytes, or those of the image whose transparency (alpha) is the mask.
        size: width and height of the image, in pixels.
    """
    try:
        mask = decode_mask(data, alpha=alpha)
    except DECODE_ERRORS as error:
        return f"cannot be decoded: {error}; replace or remove it"
    ratio = (mask.width * size[1]) / (mask.height * size[0])
    if abs(ratio - 1) > _PROPORTION:
        return (
            f"has {mask.width}x{mask.height} pixels, but its image {image.path.name} {size[0]}x{size[1]}; expected"
            " the same proportions"
        )
    if mask.getextrema() == (0, 0):
        what = "is transparent everywhere" if alpha else "is black everywhere"
        return f"{what}, so nothing of its image would be learned; remove the image, or mark a part of it"
    return None


def wanted_mask(root: Path, image: Place, settings: MaskedLoss) -> str:
    """Returns where the mask of an image is expected, for a message."""
    if settings.source == "alpha":
        return "expected a transparency channel"
    if image.row is not None:
        return "expected an image in the column mask"
    if settings.folder is not None:
        return f"expected {settings.folder / image.path.relative_to(root).with_suffix('.png')}"
    return f"expected {image.path.with_suffix('.mask.png').name} next to it"
