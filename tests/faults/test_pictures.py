"""Tests of image files that lie: other formats under an accepted name, color profiles that are not what they say."""

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageCms, ImageOps

from halfbyte.quant.files.digest import sha256_of
from halfbyte.trainer.data.cache.encodings import LatentCache
from halfbyte.trainer.data.pictures import decode as decoding
from halfbyte.trainer.data.pictures.color import to_srgb
from halfbyte.trainer.data.pictures.decode import PICTURE_SUFFIXES, decode, has_misnamed_profile
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.data.views.buckets import Cropping, views_of
from halfbyte.trainer.errors import DataError

ACCEPTED = {
    "JPEG",
    "MPO",
    "PNG",
    "WEBP",
    "BMP",
    "TIFF",
    "GIF",
    "AVIF",
}  # MPO: JPEG with further frames after it
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


def foreign_files() -> dict[str, bytes]:
    """Returns a file of every other format that Pillow writes, and some that it only reads."""
    Image.init()
    files = {
        "EPS": EPS,
        "PSD": b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 8, 8, 8, 3) + bytes(12) + bytes(2 + 3 * 64),
        "FITS": b"".join(
            line.ljust(80)
            for line in (
                b"SIMPLE  =                    T",
                b"BITPIX  =                    8",
                b"NAXIS   =                    2",
                b"NAXIS1  =                    8",
                b"NAXIS2  =                    8",
                b"END",
            )
        ).ljust(2880)
        + bytes(2880),
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
        "WMF": b"\xd7\xcd\xc6\x9a\x00\x00"
        + struct.pack("<4hH", 0, 0, 64, 64, 72)
        + bytes(6)
        + b"\x01\x00\t\x00",
        "XPM": b'/* XPM */\nstatic char *a[] = {\n"1 1 1 1",\n"a c #ff0000",\n"a"\n};\n',
    }
    for kind in set(Image.SAVE) - ACCEPTED - set(files):
        for mode in ("RGB", "L", "1", "P"):
            stream = io.BytesIO()
            try:
                Image.new(mode, (64, 64)).save(stream, kind)
            except (OSError, ValueError, KeyError):
                continue
            files[kind] = stream.getvalue()
            break
    return files


FOREIGN = foreign_files()


def test_enough_formats_are_tried() -> None:
    assert {"EPS", "PDF", "PSD", "ICNS", "FITS", "ICO", "TGA", "PPM", "JPEG2000", "PCX", "SGI", "DDS"} <= set(
        FOREIGN
    )
    assert not ACCEPTED & set(FOREIGN)


@pytest.mark.parametrize("kind", sorted(FOREIGN))
def test_another_format_under_an_accepted_name_is_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(FOREIGN[kind])
    for known in (False, True):  # an image that was decoded before is only opened
        with pytest.raises(DataError) as caught:
            read_samples(tmp_path, CaptionStyle("x"), is_decoded=lambda sha256, known=known: known)
        message = str(caught.value)
        assert message.startswith(f"{file}: ")
        assert len(message.splitlines()) == 1
        assert all(accepted in message for accepted in ACCEPTED - {"MPO"}), message


def test_ghostscript_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, proof = tmp_path / "bin" / "gs", tmp_path / "started"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {proof}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow remembers where it found the program
    with pytest.raises(OSError), Image.open(io.BytesIO(EPS)) as image:
        image.load()
    assert proof.is_file(), "Pillow would start it"
    proof.unlink()
    for suffix in PICTURE_SUFFIXES:
        (tmp_path / f"a{suffix}").write_bytes(EPS)
    with pytest.raises(DataError):
        read_samples(tmp_path, CaptionStyle("x"))
    assert not proof.exists()


# Primaries in the profile's connection space, and curves, in the form of ICC profiles.
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
LINEAR = (1.0,)


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(name: str, primaries: tuple[tuple[float, ...], ...], curve: tuple[float, ...]) -> bytes:
    text = name.encode("utf-16-be")
    tags = {
        b"desc": b"mluc\0\0\0\0"
        + struct.pack(">II", 1, 12)
        + b"enUS"
        + struct.pack(">II", len(text), 28)
        + text,
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.82491),
    }
    for letter, column in zip(b"rgb", primaries, strict=True):
        tags[bytes([letter]) + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(*column)
        kind = {1: 0, 5: 3}[len(curve)]
        tags[bytes([letter]) + b"TRC"] = b"para\0\0\0\0" + struct.pack(">HH", kind, 0) + fixed(*curve)
    table, data, place = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, body in tags.items():
        padded = body + b"\0" * (-len(body) % 4)
        table += tag + struct.pack(">II", place + len(data), len(padded))
        data += padded
    head = struct.pack(">I", place + len(data)) + b"\0\0\0\0" + bytes([4, 0x30, 0, 0]) + b"mntrRGB XYZ "
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + fixed(0.9642, 1.0, 0.82491)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def png(color: tuple[int, int, int], icc_profile: bytes, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (96, 96), color).convert(mode).save(stream, "PNG", icc_profile=icc_profile)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "primaries", "curve", "stored", "meant"),
    [
        ("Display P3 Gamut with sRGB Transfer", P3, SRGB_CURVE, (234, 51, 35), (255, 0, 0)),
        ("DCI-P3 D65 Gamut with sRGB Transfer", P3, SRGB_CURVE, (234, 51, 35), (255, 0, 0)),
        ("Display P3", P3, SRGB_CURVE, (234, 51, 35), (255, 0, 0)),
        ("GIMP built-in Linear sRGB", SRGB, LINEAR, (55, 55, 55), (128, 128, 128)),
        ("linear Rec709", SRGB, LINEAR, (55, 55, 55), (128, 128, 128)),
    ],
)
def test_a_profile_is_judged_by_its_colors_not_by_its_name(
    name: str,
    primaries: tuple[tuple[float, ...], ...],
    curve: tuple[float, ...],
    stored: tuple[int, int, int],
    meant: tuple[int, int, int],
) -> None:
    data = png(stored, profile(name, primaries, curve))
    found = np.asarray(decode(data))[48, 48].astype(int)
    assert np.abs(found - meant).max() <= 1, found
    assert has_misnamed_profile(data) == ("sRGB" in name)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_real_srgb_is_left_as_it_is(mode: str) -> None:
    for icc_profile in (
        profile("sRGB", SRGB, SRGB_CURVE),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    ):
        data = png((55, 120, 3), icc_profile, mode)
        plain = Image.new("RGB", (96, 96), (55, 120, 3)).convert(mode).convert("RGB")
        assert np.array_equal(np.asarray(decode(data)), np.asarray(plain))
        assert not has_misnamed_profile(data)


def test_a_gray_image_with_a_linear_profile_is_converted() -> None:
    data = png((55, 55, 55), profile("Linear sRGB", SRGB, LINEAR), "L")
    assert abs(decode(data).getpixel((5, 5))[0] - 128) <= 1


def test_only_the_cache_entries_of_misnamed_profiles_change(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png((1, 2, 3), profile("sRGB", SRGB, SRGB_CURVE)))
    (tmp_path / "b.png").write_bytes(png((1, 2, 3), profile("Linear sRGB", SRGB, LINEAR)))
    views = [
        group[0] for group in views_of(read_samples(tmp_path, CaptionStyle("x")), [Cropping(32, 16)], seed=0)
    ]
    assert [view.sample.misnamed_profile for view in views] == [False, True]
    cache = LatentCache(tmp_path, "vae")
    # Names that version 0.2.0 gave: the entry of a real sRGB image is still found.
    made_from = f'[1, {list(views[0].box)}, 32, 32, false, "vae"]'
    assert cache.file(views[0]).stem == sha256_of(made_from)
    made_from = f'[2, {list(views[1].box)}, 32, 32, false, "vae"]'
    assert cache.file(views[1]).stem == sha256_of(made_from)


def varied(mode: str) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (70, 90, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(values[..., 0].astype(np.float32) / 255)
    if mode in ("LA", "RGBA", "PA"):
        return Image.fromarray(values).convert(mode)
    return Image.fromarray(values[..., :3]).convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("L", "JPEG"),
        ("CMYK", "TIFF"),
        ("I;16", "PNG"),
        ("F", "TIFF"),
    ],
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_images_converted_in_bands_are_bitwise_identical(
    monkeypatch: pytest.MonkeyPatch, mode: str, kind: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"icc_profile": profile("P3", P3, SRGB_CURVE)} if mode == "RGB" else {}
    stream = io.BytesIO()
    varied(mode).save(stream, kind, exif=exif, **options)
    data = stream.getvalue()
    whole = to_srgb(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    width, height = whole.size
    monkeypatch.setattr(decoding, "_BAND_PIXELS", 700)
    assert np.array_equal(np.asarray(decode(data)), np.asarray(whole))
    for box in ((3, 5, width - 2, height - 7), (0, 0, 32, 32), (10, 0, 26, height)):
        assert np.array_equal(np.asarray(decode(data, box)), np.asarray(whole.crop(box)))
