"""Tests of decoding: every image comes out upright and in sRGB, as viewers show it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from halfbyte.trainer.data.pictures.decode import DECODE_ERRORS, decode, pixels, upright_size

# Top row red and green, bottom row blue and white, each a flat square.
COLORS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def squares(width: int = 16, height: int = 24) -> Image.Image:
    return Image.fromarray(COLORS).resize((width, height), Image.Resampling.NEAREST)


def array(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    assert upright_size(data) == image.size
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP"])
def test_lossless_formats_decode_exactly(kind: str) -> None:
    assert np.array_equal(
        array(encoded(squares(), kind, **({"lossless": True} if kind == "WEBP" else {}))), squares()
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = squares() if undo is None else squares().transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = array(encoded(stored, kind, exif=exif))
    assert got.shape == (24, 16, 3)
    assert np.abs(got[[2, 2, -3, -3], [2, -3, 2, -3]] - COLORS.reshape(4, 3)).max() < 80


def test_a_png_orientation_stored_after_the_pixels_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with_exif = encoded(squares(), "PNG", exif=exif)
    start = with_exif.index(b"eXIf") - 4
    chunk = with_exif[start : start + 12 + int.from_bytes(with_exif[start : start + 4], "big")]
    plain = with_exif.replace(chunk, b"")
    assert array(plain).shape == (24, 16, 3)
    end = plain.index(b"IEND") - 4
    assert array(plain[:end] + chunk + plain[end:]).shape == (16, 24, 3)


def test_the_size_is_read_without_decoding() -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = encoded(Image.effect_noise((64, 32), 50), kind)
        cut = whole[: len(whole) // 2] if kind != "WEBP" else whole
        assert upright_size(cut) == (64, 32)


def test_transparency_shows_white() -> None:
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert array(encoded(image, "PNG")).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    image.putpixel((1, 0), (0, 0, 0, 128))
    assert array(encoded(image, "PNG"))[0, 1].tolist() == [127, 127, 127]


def test_transparency_of_gray_and_palette_images() -> None:
    grey = Image.new("LA", (2, 1), (100, 255))
    grey.putpixel((1, 0), (0, 0))
    assert array(encoded(grey, "PNG")).tolist() == [[[100] * 3, [255] * 3]]
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 250, 120, 10])
    palette.putpixel((1, 0), 0)
    assert array(encoded(palette, "PNG", transparency=0)).tolist() == [[[250, 120, 10], [255] * 3]]
    assert array(encoded(palette, "PNG")).tolist() == [[[250, 120, 10], [0] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_its_shades(kind: str) -> None:
    values = np.array([[0, 128, 129, 257, 128 * 257, 65535]], dtype=np.uint16)
    got = array(encoded(Image.fromarray(values), kind))
    assert got[0].tolist() == [[shade] * 3 for shade in (0, 0, 1, 1, 128, 255)]


def test_floating_point_gray() -> None:
    inside = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert array(encoded(inside, "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
    outside = Image.fromarray(np.array([[0.0, 900.0]], dtype=np.float32))
    with pytest.raises(DECODE_ERRORS, match=r"outside 0\.\.1"):
        decode(encoded(outside, "TIFF"))


def test_integers_beyond_16_bits_are_refused() -> None:
    with pytest.raises(DECODE_ERRORS, match="32-bit integer"):
        decode(encoded(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "TIFF"))


@pytest.mark.parametrize("mode", ["L", "1", "CMYK"])
def test_other_modes(mode: str) -> None:
    got = array(encoded(squares().convert(mode), "TIFF"))
    assert got.shape == (24, 16, 3)
    assert (got[-3, -3] > 240).all(), "white stays white"
    assert got[-3, 2].sum() < 400, "blue stays dark"


def test_cmyk_jpeg_is_not_inverted() -> None:
    got = array(encoded(squares().convert("CMYK"), "JPEG", quality=95))
    assert (got[-3, -3] > 240).all()
    assert got[2, 2].argmax() == 0


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert array(data)[0, 0].tolist() == [255, 0, 0]


def swapped_primaries() -> bytes:
    """Returns the sRGB profile with red and green swapped, under another name."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"rXYZ", b"temp").replace(b"gXYZ", b"rXYZ").replace(b"temp", b"gXYZ")
    return profile.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


def test_an_embedded_color_profile_is_applied() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(array(encoded(squares(), "PNG", icc_profile=srgb)), squares())
    swapped = array(encoded(squares(), "PNG", icc_profile=swapped_primaries()))
    assert np.abs(swapped - np.asarray(squares())[..., [1, 0, 2]]).max() <= 3


def test_a_profile_of_another_color_space_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert np.array_equal(array(encoded(squares(), "PNG", icc_profile=lab)), squares())
    assert "color profile" in caplog.text


def test_a_broken_color_profile_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    got = array(encoded(squares(), "PNG", icc_profile=b"not a profile"))
    assert np.array_equal(got, squares())
    assert "color profile" in caplog.text


class TestPixels:
    def test_range_and_layout(self) -> None:
        values = pixels(squares(), (16, 24), flip=False)
        assert values.dtype == torch.float32
        assert values.shape == (3, 24, 16)
        assert values[:, 0, 0].tolist() == [1.0, -1.0, -1.0]
        assert values[:, -1, -1].tolist() == [1.0, 1.0, 1.0]
        assert values.is_contiguous()

    def test_flip_mirrors_left_and_right(self) -> None:
        plain = pixels(squares(), (8, 12), flip=False)
        assert torch.equal(pixels(squares(), (8, 12), flip=True), plain.flip(-1))

    def test_nothing_outside_the_box_bleeds_in(self) -> None:
        values = pixels(decode(encoded(squares(), "PNG"), (0, 0, 8, 12)), (4, 4), flip=False)
        assert torch.equal(values, torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 4, 4))

    def test_shrinking_averages_instead_of_skipping(self) -> None:
        stripes = Image.fromarray(np.tile(np.array([[0], [255]], dtype=np.uint8), (64, 128))).convert("RGB")
        values = pixels(stripes, (8, 8), flip=False)
        assert values.abs().max() < 0.05
