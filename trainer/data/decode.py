"""From a picture file's bytes to upright RGB, and from there to the pixels that the VAE reads."""

import io
import logging
import struct
import zlib

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps
from torch import Tensor

log = logging.getLogger(__name__)

# Twice Pillow's own warning threshold (178 million pixels): beyond it a small file may fill the memory.
MAX_PIXELS = 178_956_970

# What Pillow's decoders raise for damaged files, in its own words or its codecs'.
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


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) as seen after EXIF rotation, from the header alone. Raises one of DECODE_ERRORS."""
    with Image.open(io.BytesIO(data)) as image:
        width, height = _bounded(image.size)
        if image.format == "TIFF":
            return width, height  # upright from the start; Pillow leaves every other kind to exif_transpose
        # A PNG's own getexif decodes all pixels to reach what may come after them.
        to_the_end = image.format == "PNG" and _has_late_metadata(data)
        exif = image.getexif() if to_the_end else Image.Image.getexif(image)
    return (height, width) if exif.get(ExifTags.Base.Orientation) in _QUARTER_TURNS else (width, height)


def decode(data: bytes) -> Image.Image:
    """The first frame, upright, as 8-bit sRGB, transparency over white.

    Raises one of DECODE_ERRORS.
    """
    with Image.open(io.BytesIO(data)) as image:
        _bounded(image.size)
        image.load()
        upright = ImageOps.exif_transpose(image)
    return _rgb(upright)


def pixels(
    image: Image.Image, *, box: tuple[int, int, int, int], size: tuple[int, int], flip: bool
) -> Tensor:
    """The box (left, top, right, bottom) of an RGB picture at size (W, H): (3, H, W) fp32 in [-1, 1].

    Lanczos with the kernel widened when shrinking. Cropped first: resize(box=...) would look past its edges.
    """
    crop = image.crop(box).resize(size, Image.Resampling.LANCZOS)
    if flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    values = torch.from_numpy(np.array(crop, dtype=np.uint8))
    return values.permute(2, 0, 1).to(torch.float32).div(127.5).sub(1.0).contiguous()


def _bounded(size: tuple[int, int]) -> tuple[int, int]:
    width, height = size
    if width * height > MAX_PIXELS:
        raise ValueError(f"has {width}x{height} pixels, more than {MAX_PIXELS:,}: make it smaller")
    return size


def _has_late_metadata(png: bytes) -> bool:
    """Whether a chunk that may hold an orientation follows the pixels."""
    place, after_pixels = 8, False
    while place + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, place)
        after_pixels |= kind == b"IDAT"
        if after_pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            return True
        place += 12 + length
    return False


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_integers(image)
    if image.mode == "F":
        return _from_floats(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        paper.info = image.info
        image = Image.alpha_composite(paper, image)
        image.info = paper.info
        image = image.convert("RGB")
    elif image.mode in ("1", "P"):
        image = image.convert("RGB")
    return _srgb(image)


def _from_integers(image: Image.Image) -> Image.Image:
    """16-bit grey: 65535 is white. Pillow's own conversion clips at 255 and would give a white page."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("has 32-bit integer pixels: save it with 8 or 16 bits a channel")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def _from_floats(image: Image.Image) -> Image.Image:
    """Floating-point grey: 1.0 is white."""
    values = np.asarray(image)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise ValueError("has floating-point pixels outside 0..1: save it with 8 or 16 bits a channel")
    return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")


def _srgb(image: Image.Image) -> Image.Image:
    """Through the embedded colour profile where there is one, since the models know sRGB alone."""
    embedded = image.info.get("icc_profile")
    if embedded and image.mode in ("RGB", "L", "CMYK"):
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(embedded))
            if "srgb" in ImageCms.getProfileDescription(profile).lower():
                return image.convert("RGB")
            srgb = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
            assert converted is not None, "only an in-place conversion returns None"
            return converted
        except (ImageCms.PyCMSError, OSError) as error:
            log.warning("a colour profile cannot be read and is taken for sRGB: %s", error)
    return image.convert("RGB")
