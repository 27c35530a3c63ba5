"""Reads the bytes of images and masks from files, tables and tar files."""

import logging
import os
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from halfbyte.quant.files.digest import sha256_of
from halfbyte.quant.files.regular import open_regular, read_regular
from halfbyte.trainer.data.archives import parquet, saved
from halfbyte.trainer.data.archives.reference_columns import reference_bytes
from halfbyte.trainer.data.pictures.decode import PICTURE_BYTES, decode, pixels
from halfbyte.trainer.data.pictures.mask import decode_mask
from halfbyte.trainer.data.records.sample import Cell, Place, Sample
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.wording import printable

log = logging.getLogger(__name__)

_FILE_BYTES = 2**50  # of a tar file; only its members are read


def read_bytes(place: Place) -> bytes:
    """Returns the bytes at a place. Raises OSError, whose `strerror` says what is wrong."""
    if place.start is not None:
        return _member(place)
    if place.row is None:
        return read_regular(place.file, PICTURE_BYTES)
    read = saved.cell_bytes if place.file.suffix == saved.SUFFIX else parquet.cell_bytes
    return read(place.file, place.row, place.part)


def _member(place: Place) -> bytes:
    assert place.start is not None, "a member of a tar file has a place in it"
    # Opened for each member, so that a file that was replaced is read as it is now.
    with open_regular(place.file, _FILE_BYTES) as file:
        data = os.pread(file.fileno(), place.size, place.start)
    if len(data) < place.size:
        raise OSError(None, f"its tar file {place.file} has become shorter")
    return data


def sample_bytes(sample: Sample) -> bytes:
    """Returns the bytes of the image file. Raises DataError if they changed since the sample was read."""
    return _unchanged(sample.place, sample.sha256, sample.cell)


def _unchanged(place: Place, sha256: str, cell: Cell | None = None) -> bytes:
    try:
        data = read_bytes(place) if cell is None else reference_bytes(place.file, place.row or 0, cell)
    except OSError as error:
        raise DataError(f"{printable(place.path)}: cannot be read: {error.strerror}") from error
    if sha256_of(data) != sha256:
        raise DataError(f"{printable(place.path)}: changed since the run was started; start again")
    return data


def load_pixels(sample: Sample, box: tuple[int, int, int, int], size: tuple[int, int], flip: bool) -> Tensor:
    """Loads the box (left, top, right, bottom) of the upright image, scaled to (W, H): (3, H, W) fp32 in [-1, 1]."""
    return pixels(decode(sample_bytes(sample), box), size, flip=flip)


def load_mask(sample: Sample) -> Image.Image:
    """Returns the mask of a masked sample, of mode L and upright, see `decode_mask`.

    Raises:
        DataError: the mask is gone, or changed since it was found.
    """
    mask = sample.mask
    assert mask is not None, "only masked images have a mask"
    if mask.place is None:
        return decode_mask(sample_bytes(sample), alpha=True)
    return decode_mask(_unchanged(mask.place, mask.sha256), alpha=False)


def unchanged_pictures(
    samples: Sequence[Sample], longer_side: int | None, used_for: str
) -> list[Image.Image | None]:
    """Decodes images, reduced to `longer_side` pixels. Gives None for those that are gone or have changed.

    Logs a warning for these, with what the images are used for: a finished run must not fail because of them.
    """
    pictures: list[Image.Image | None] = []
    lost: list[str] = []
    for sample in samples:
        try:
            picture = decode(sample_bytes(sample))
        except DataError as error:
            lost.append(str(error).removesuffix("; start again"))
            pictures.append(None)
            continue
        if longer_side is not None:
            picture.thumbnail((longer_side, longer_side))
        pictures.append(picture)
    if lost:
        log.warning("left out of %s: %d of %d images; %s", used_for, len(lost), len(samples), lost[0])
    return pictures
