"""Finds the masks of a data set's images, and reports those that are missing or cannot be used."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from halfbyte.quant.files.digest import sha256_of
from halfbyte.quant.files.regular import read_regular
from halfbyte.trainer.data.pictures.decode import DECODE_ERRORS, PICTURE_BYTES, PICTURE_SUFFIXES
from halfbyte.trainer.data.pictures.mask import decode_mask, has_alpha
from halfbyte.trainer.data.sources.captions import Problems
from halfbyte.trainer.data.sources.folder import Mask, Sample, is_inside, sample_bytes
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.recipe.data_section import DataSet
from halfbyte.trainer.wording import printable

_MARK = ".mask"  # dog.mask.png is the mask of dog.jpg
_PROPORTION = 0.02  # the relative difference between the proportions of a mask and its image that is accepted


def with_masks(
    samples: Sequence[Sample], data_set: DataSet, *, is_known: Callable[[Sample], bool] = lambda sample: False
) -> list[Sample]:
    """Returns the samples of a data set with their masks.

    Args:
        is_known: returns True for a sample whose mask has been checked before and need not be decoded again.

    Raises:
        DataError: with one line for each image whose mask is missing, cannot be decoded, has other proportions, or is
            black everywhere, so that nothing would be learned.
    """
    settings, problems = data_set.masked_loss, Problems()
    if settings.source == "none":
        return list(samples)
    if settings.source == "alpha":
        found = [_with_alpha(sample, is_known, problems) for sample in samples]
    else:
        files = _mask_files(data_set, problems)
        found = [_with_file(sample, data_set, files, is_known, problems) for sample in samples]
    if settings.missing == "error":
        for sample in found:
            if sample.mask is None:
                wanted = _wanted(sample, data_set)
                problems.add(sample.path, f"has no mask; {wanted}, or set masked_loss.missing: whole")
    if problems.lines:
        raise DataError(str(problems))
    return found


def load_mask(sample: Sample) -> Image.Image:
    """Returns the mask of a masked sample, of mode L and upright, see `decode_mask`.

    Raises:
        DataError: the mask is gone, or changed since it was found.
    """
    mask = sample.mask
    assert mask is not None, "only masked images have a mask"
    if mask.path is None:
        return decode_mask(sample_bytes(sample), alpha=True)
    try:
        data = read_regular(mask.path, PICTURE_BYTES)
    except OSError as error:
        raise DataError(f"{printable(mask.path)}: cannot be read: {error.strerror}") from error
    if sha256_of(data) != mask.sha256:
        raise DataError(f"{printable(mask.path)}: changed since the run was started; start again")
    return decode_mask(data, alpha=False)


def _with_alpha(sample: Sample, is_known: Callable[[Sample], bool], problems: Problems) -> Sample:
    data = sample_bytes(sample)
    if not has_alpha(data):
        return sample
    masked = replace(sample, mask=Mask(None, sample.sha256))
    if not is_known(masked):
        _check(sample, data, sample.path, alpha=True, problems=problems)
    return masked


def _with_file(
    sample: Sample,
    data_set: DataSet,
    files: dict[Path, Path],
    is_known: Callable[[Sample], bool],
    problems: Problems,
) -> Sample:
    if sample.row is not None:
        problems.add(
            sample.path, "holds its images inside; masks in files need images in files, or use source: alpha"
        )
        return replace(sample, mask=Mask(None, sample.sha256))
    name = sample.path.relative_to(_root(data_set)).with_suffix("")
    file = files.get(name)
    if file is None:
        return sample
    try:
        data = read_regular(file, PICTURE_BYTES)
    except OSError as error:
        problems.add(file, f"cannot be read: {error.strerror}")
        return replace(sample, mask=Mask(file, ""))
    masked = replace(sample, mask=Mask(file, sha256_of(data)))
    if not is_known(masked):
        _check(sample, data, file, alpha=False, problems=problems)
    return masked


def _check(sample: Sample, data: bytes, file: Path, *, alpha: bool, problems: Problems) -> None:
    try:
        mask = decode_mask(data, alpha=alpha)
    except DECODE_ERRORS as error:
        problems.add(file, f"cannot be decoded: {error}; replace or remove it")
        return
    ratio = (mask.width * sample.height) / (mask.height * sample.width)
    if abs(ratio - 1) > _PROPORTION:
        problems.add(
            file,
            f"has {mask.width}x{mask.height} pixels, but its image {sample.path.name} {sample.width}x{sample.height};"
            " expected the same proportions",
        )
    elif mask.getextrema() == (0, 0):
        what = "is transparent everywhere" if alpha else "is black everywhere"
        problems.add(
            file, f"{what}, so nothing of its image would be learned; remove the image, or mark a part of it"
        )


def _root(data_set: DataSet) -> Path:
    return data_set.path if data_set.path.is_dir() else data_set.path.parent


def _mask_files(data_set: DataSet, problems: Problems) -> dict[Path, Path]:
    """Returns the mask files by the names of their images, relative to the data set and without suffix.

    Of several masks of one name, the first in the order of names counts.
    """
    folder = data_set.masked_loss.folder
    base = folder or _root(data_set)
    found: dict[Path, Path] = {}
    for file in sorted(base.rglob("*"), reverse=True):
        name = file.relative_to(base).with_suffix("")
        marked = name.suffix.lower() == _MARK
        if file.suffix.lower() not in PICTURE_SUFFIXES or not (marked or folder):
            continue
        if not is_inside(base, file):
            problems.add(file, f"is a symbolic link to a file outside {base}; copy the file instead")
            continue
        found[name.with_suffix("") if marked else name] = file
    return found


def _wanted(sample: Sample, data_set: DataSet) -> str:
    settings = data_set.masked_loss
    if settings.source == "alpha":
        return "expected a transparency channel"
    name = sample.path.relative_to(_root(data_set))
    if settings.folder is not None:
        return f"expected {settings.folder / name.with_suffix('.png')}"
    return f"expected {sample.path.with_suffix('.mask.png').name} next to it"
