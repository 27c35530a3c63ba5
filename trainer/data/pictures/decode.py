"""Decodes image files to upright RGB, and crops and scales them to the pixels that the VAE encodes."""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from halfbyte.trainer.data.pictures.color import misnamed_srgb, to_srgb
from halfbyte.trainer.wording import in_prose

# The formats that are decoded, whatever a file is called. Pillow would also run Ghostscript for an EPS file.
_FORMATS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
}
PICTURE_SUFFIXES = tuple(suffix for suffixes in _FORMATS.values() for suffix in suffixes)
PICTURE_BYTES = 10**9
"""Larger image files are refused: they are read as a whole."""

# Twice the threshold (89 million pixels) at which Pillow warns of decompression bombs: a small file with more pixels
# could fill the memory.
MAX_PIXELS = 178_956_970

_BAND_PIXELS = 2**22  # images are converted in bands of this size, to save memory

# The exceptions that Pillow and its codecs raise for damaged files.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    ArithmeticError,
    RuntimeError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the upright image


def open_picture(data: bytes) -> Image.Image:
    """Opens an image of an accepted format, without decoding it. Raises one of DECODE_ERRORS."""
    try:
        return Image.open(io.BytesIO(data), formats=tuple(_FORMATS))
    except UnidentifiedImageError as error:
        raise ValueError(f"not an image in {in_prose(_FORMATS)} format") from error


def upright_size(data: bytes) -> tuple[int, int]:
    """Returns (width, height) after EXIF rotation, without decoding the pixels. Raises one of DECODE_ERRORS."""
    with open_picture(data) as image:
        width, height = _bounded(image.size)
        if image.format == "TIFF":
            return (
                width,
                height,
            )  # Pillow rotates TIFF when opening it, and leaves other formats to exif_transpose
        # PNG's getexif decodes all pixels to reach metadata after them; skip that if there is none.
        read_to_end = image.format == "PNG" and _has_late_metadata(data)
        exif = image.getexif() if read_to_end else Image.Image.getexif(image)
    return (height, width) if exif.get(ExifTags.Base.Orientation) in _QUARTER_TURNS else (width, height)


def decoded_size(data: bytes) -> tuple[int, int]:
    """Returns (width, height) like `upright_size`, after decoding the whole image. Raises one of DECODE_ERRORS."""
    with open_picture(data) as image:
        _bounded(image.size)
        image.load()
        if image.mode[0] in "IF":  # modes that cannot be converted for every value
            for band in _bands(image, (0, 0, *image.size)):
                to_srgb(band)
    return upright_size(data)


def has_misnamed_profile(data: bytes) -> bool:
    """Returns True if a color profile says sRGB but is not. Older versions did not convert such an image."""
    with open_picture(data) as image:
        return misnamed_srgb(image.info.get("icc_profile"))


def decode(data: bytes, box: Box | None = None) -> Image.Image:
    """Decodes the first frame, upright, to 8-bit sRGB, with transparency over white. Raises one of DECODE_ERRORS.

    With a box (left, top, right, bottom) only that part is converted and returned.
    """
    with open_picture(data) as image:
        load_upright(image)
        return _converted(image, box or (0, 0, *image.size))


def _converted(image: Image.Image, box: Box) -> Image.Image:
    """Converts a part of an image to sRGB, with two copies of the part in memory at most."""
    whole = Image.new("RGB", (box[2] - box[0], box[3] - box[1]))
    top = 0
    for band in _bands(image, box):
        whole.paste(to_srgb(band), (0, top))
        top += band.height
    return whole


def load_upright(image: Image.Image) -> None:
    """Decodes an opened image and applies its EXIF orientation, in place. Raises one of DECODE_ERRORS."""
    _bounded(image.size)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)


def _bands(image: Image.Image, box: Box) -> Iterator[Image.Image]:
    """Yields copies of the box's rows, from top to bottom."""
    left, top, right, bottom = box
    height = max(1, _BAND_PIXELS // (right - left))
    for start in range(top, bottom, height):
        yield image.crop((left, start, right, min(start + height, bottom)))


def pixels(image: Image.Image, size: tuple[int, int], *, flip: bool) -> Tensor:
    """Returns an RGB image scaled to (W, H) as (3, H, W) fp32 in [-1, 1]."""
    values = torch.from_numpy(scaled(image, size, flip=flip))
    return values.permute(2, 0, 1).to(torch.float32).div(127.5).sub(1.0).contiguous()


def scaled(image: Image.Image, size: tuple[int, int], *, flip: bool) -> NDArray[np.uint8]:
    """Returns an RGB image scaled to (W, H) and mirrored if `flip` is set, (H, W, 3).

    Scales with Lanczos, whose kernel Pillow widens when shrinking. The image is already cropped, because
    resize(box=...) also reads pixels beyond the box's edges.
    """
    image = image.resize(size, Image.Resampling.LANCZOS)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image, dtype=np.uint8)


def _bounded(size: tuple[int, int]) -> tuple[int, int]:
    width, height = size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"has {width}x{height} pixels, expected at most {MAX_PIXELS:,} in all; make it smaller"
        )
    return size


def _has_late_metadata(png: bytes) -> bool:
    """Returns True if a chunk that may hold an EXIF orientation follows the pixels (IDAT)."""
    offset, after_pixels = 8, False  # after the 8-byte signature
    while offset + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, offset)
        after_pixels |= kind == b"IDAT"
        if after_pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            return True
        offset += 12 + length  # length, kind and checksum take 4 bytes each
    return False
