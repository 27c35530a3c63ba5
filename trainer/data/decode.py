"""Decodes image files to upright RGB, and crops and scales them to the pixels that the VAE encodes."""

import io
import logging
import struct
import zlib

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps
from torch import Tensor

log = logging.getLogger(__name__)

# Twice the threshold (89 million pixels) at which Pillow warns of decompression bombs: a small file with more pixels
# could fill the memory.
MAX_PIXELS = 178_956_970

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


def upright_size(data: bytes) -> tuple[int, int]:
    """Returns (width, height) after EXIF rotation, without decoding the pixels. Raises one of DECODE_ERRORS."""
    with Image.open(io.BytesIO(data)) as image:
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


def decode(data: bytes) -> Image.Image:
    """Decodes the first frame, upright, to 8-bit sRGB, with transparency over white. Raises one of DECODE_ERRORS."""
    with Image.open(io.BytesIO(data)) as image:
        _bounded(image.size)
        image.load()
        upright = ImageOps.exif_transpose(image)
    return _rgb(upright)


def pixels(
    image: Image.Image, *, box: tuple[int, int, int, int], size: tuple[int, int], flip: bool
) -> Tensor:
    """Returns the box (left, top, right, bottom) of an RGB image, scaled to (W, H), as (3, H, W) fp32 in [-1, 1].

    Scales with Lanczos, whose kernel Pillow widens when shrinking. Crops first, because resize(box=...) also reads
    pixels beyond the box's edges.
    """
    crop = image.crop(box).resize(size, Image.Resampling.LANCZOS)
    if flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    values = torch.from_numpy(np.array(crop, dtype=np.uint8))
    return values.permute(2, 0, 1).to(torch.float32).div(127.5).sub(1.0).contiguous()


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


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_integers(image)
    if image.mode == "F":
        return _from_floats(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        background.info = image.info
        image = Image.alpha_composite(background, image)
        image.info = background.info  # keeps the color profile
        image = image.convert("RGB")
    elif image.mode in ("1", "P"):
        image = image.convert("RGB")
    return _srgb(image)


def _from_integers(image: Image.Image) -> Image.Image:
    """Converts 16-bit gray, where 65535 is white. Pillow's own conversion clips at 255, so almost all becomes white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("has 32-bit integer pixels; save it with 8 or 16 bits per channel")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def _from_floats(image: Image.Image) -> Image.Image:
    """Converts floating-point gray, where 1.0 is white."""
    values = np.asarray(image)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise ValueError("has floating-point pixels outside 0..1; save it with 8 or 16 bits per channel")
    return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")


def _srgb(image: Image.Image) -> Image.Image:
    """Converts to sRGB, which the models were trained on, by the embedded color profile if there is one."""
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
            log.warning("cannot read an image's color profile and assume sRGB: %s", error)
    return image.convert("RGB")
