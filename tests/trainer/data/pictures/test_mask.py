"""Tests of masks on the latent grid: against plain averages, under crop, flip and rotation, from every kind of file."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from halfbyte.trainer.data.pictures.mask import coverage, decode_mask, has_alpha

VALUES = np.random.default_rng(0).integers(0, 256, (96, 128), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def averaged(values: np.ndarray, cell: int) -> Tensor:
    """Returns the mean of each square of `cell` pixels, in float64, from 0 to 1."""
    return F.avg_pool2d(torch.from_numpy(values).double()[None, None], cell)[0, 0] / 255


def test_a_cell_holds_the_mean_of_its_pixels() -> None:
    found = coverage(Image.fromarray(VALUES), (0, 0, 128, 96), (128, 96), (16, 12), flip=False)
    assert found.shape == (12, 16)
    assert torch.allclose(found.double(), averaged(VALUES, 8), atol=1e-6)


def test_a_crop_and_a_flip_are_those_of_the_image() -> None:
    found = coverage(Image.fromarray(VALUES), (8, 16, 72, 80), (128, 96), (8, 8), flip=True)
    expected = averaged(VALUES[16:80, 8:72], 8).flip(1)
    assert torch.allclose(found.double(), expected, atol=1e-6)


def test_a_mask_of_another_size_covers_the_same_part() -> None:
    half = VALUES[::2, ::2]
    found = coverage(Image.fromarray(half), (0, 32, 64, 96), (128, 96), (4, 4), flip=False)
    assert torch.allclose(found.double(), averaged(half[16:48, 0:32], 8), atol=1e-6)


def test_cells_between_pixels_take_the_pixels_whose_centers_they_hold() -> None:
    row = np.array([[0, 255, 255, 0, 255]], dtype=np.uint8)
    found = coverage(Image.fromarray(row), (0, 0, 5, 1), (5, 1), (2, 1), flip=False)
    # The center of the third pixel lies on the border, at 2.5: Pillow counts it to the left.
    assert found.tolist() == [[pytest.approx(2 / 3), 0.5]]


GRAY = Image.fromarray(VALUES)


@pytest.mark.parametrize(
    "image",
    [
        GRAY,
        GRAY.convert("RGB"),
        GRAY.convert("LA"),
        Image.fromarray(VALUES.astype(np.uint16) * 257),
    ],
    ids=["L", "RGB", "LA", "16-bit"],
)
def test_the_gray_value_counts_whatever_the_mode(image: Image.Image) -> None:
    assert np.array_equal(np.array(decode_mask(encoded(image), alpha=False)), VALUES)


def test_transparent_parts_of_a_mask_file_are_black() -> None:
    image = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    image.putpixel((1, 0), (255, 255, 255, 0))
    assert list(np.array(decode_mask(encoded(image), alpha=False))[0]) == [255, 0]


def test_alpha_is_the_transparency_of_the_image() -> None:
    image = GRAY.convert("RGB")
    image.putalpha(Image.fromarray(255 - VALUES))
    assert has_alpha(encoded(image))
    assert np.array_equal(np.array(decode_mask(encoded(image), alpha=True)), 255 - VALUES)


def test_a_transparent_color_of_a_palette_is_alpha_too() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.putpixel((1, 0), 1)
    data = encoded(image, transparency=1)
    assert has_alpha(data)
    assert list(np.array(decode_mask(data, alpha=True))[0]) == [255, 0]


def test_an_image_without_transparency_has_no_alpha() -> None:
    assert not has_alpha(encoded(GRAY.convert("RGB"), "JPEG"))


def test_the_orientation_of_a_photo_turns_its_mask() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = decode_mask(encoded(GRAY, exif=exif), alpha=False)
    assert turned.size == (96, 128)
    assert np.array_equal(np.array(turned), np.rot90(VALUES, -1))
