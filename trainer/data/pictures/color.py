"""Converts images of any mode and color profile to 8-bit sRGB, which the models were trained on."""

import io
import logging
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

log = logging.getLogger(__name__)

# A profile that moves no color by more than this (of 255) is sRGB, written with other rounding or another curve.
_SRGB_TOLERANCE = 3


def to_srgb(image: Image.Image) -> Image.Image:
    """Converts an image to RGB, with transparency over white. The result may be the image itself.

    Each pixel is converted independently, so that an image may be converted in parts. Raises ValueError for values
    outside of the accepted range.
    """
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
    return _by_profile(image)


def misnamed_srgb(icc_profile: bytes | None) -> bool:
    """Returns True for a profile with sRGB in its name that is another color space, such as a phone's Display P3."""
    if not icc_profile:
        return False
    try:
        return _named_srgb(icc_profile) and not _is_srgb(icc_profile)
    except (ImageCms.PyCMSError, OSError):
        return False


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


def _by_profile(image: Image.Image) -> Image.Image:
    """Converts to sRGB by the embedded color profile if there is one."""
    embedded = image.info.get("icc_profile")
    if embedded and image.mode in ("RGB", "L", "CMYK"):
        try:
            if not (_named_srgb(embedded) and _is_srgb(embedded)):
                return _converted(image, embedded)
        except (ImageCms.PyCMSError, OSError) as error:
            _warn_once(embedded, str(error))
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=16)
def _warn_once(icc_profile: bytes, reason: str) -> None:
    log.warning("cannot read an image's color profile and assume sRGB: %s", reason)


def _converted(image: Image.Image, icc_profile: bytes) -> Image.Image:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
    if image.mode == "L" and _mode(profile) == "RGB" and _named_srgb(icc_profile):
        image = image.convert("RGB")
    srgb = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
    assert converted is not None, "only an in-place conversion returns None"
    return converted


def _mode(profile: ImageCms.ImageCmsProfile) -> str:
    """Returns the mode of the images that a profile describes: L for gray."""
    space = str(profile.profile.xcolor_space).strip()
    return "L" if space == "GRAY" else space


@lru_cache(maxsize=16)
def _named_srgb(icc_profile: bytes) -> bool:
    profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
    return "srgb" in ImageCms.getProfileDescription(profile).lower()


@lru_cache(maxsize=16)
def _is_srgb(icc_profile: bytes) -> bool:
    """Returns True if the profile leaves colors nearly unchanged. Raises PyCMSError for an unusable profile."""
    profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
    shades = np.arange(0, 256, 15, dtype=np.uint8)
    if _mode(profile) == "L":
        colors = Image.fromarray(shades[None])
    else:
        cube = np.stack(np.meshgrid(shades, shades, shades, indexing="ij"), axis=-1)
        colors = Image.fromarray(cube.reshape(len(shades), -1, 3))
    moved = _converted(colors, icc_profile)
    before = np.asarray(colors.convert("RGB")).astype(int)
    return bool(np.abs(np.asarray(moved).astype(int) - before).max() <= _SRGB_TOLERANCE)
