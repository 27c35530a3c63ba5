"""Reads masks: gray images, or the images' own transparency. Averages them over the cells of the latent grid."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from halfbyte.trainer.data.pictures.color import to_srgb
from halfbyte.trainer.data.pictures.decode import Box, load_upright, open_picture


def has_alpha(data: bytes) -> bool:
    """Returns True if the image file has a transparency channel or color. Raises one of DECODE_ERRORS."""
    with open_picture(data) as image:
        return bool(image.has_transparency_data)


def decode_mask(data: bytes, *, alpha: bool) -> Image.Image:
    """Decodes a mask, upright, as an image of mode L: white (255) is learned. Raises one of DECODE_ERRORS.

    alpha: take the transparency of the image, where opaque is white; otherwise its gray value, over black.
    """
    with open_picture(data) as image:
        load_upright(image)
        if not image.has_transparency_data:
            return Image.new("L", image.size, 255) if alpha else to_srgb(image).convert("L")
        image = image.convert("RGBA")
        if alpha:
            return image.getchannel("A")
        black = Image.new("RGBA", image.size, "black")
        return Image.alpha_composite(black, image).convert("L")


def coverage(
    mask: Image.Image, box: Box, size: tuple[int, int], grid: tuple[int, int], *, flip: bool
) -> Tensor:
    """Returns the mask of a part of an image on the latent grid, (h, w) fp32 from 0 to 1.

    A cell holds the mean of the mask's pixels whose centers lie in it.

    Args:
        mask: of mode L. It may be smaller or larger than its image.
        box: left, top, right, bottom, in pixels of the image.
        size: width and height of the image, in pixels.
        grid: (w, h), the width and height of the latents.
    """
    across, down = mask.width / size[0], mask.height / size[1]
    part = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    cells = mask.convert("F").resize(grid, Image.Resampling.BOX, box=part)
    if flip:
        cells = ImageOps.mirror(cells)
    return torch.from_numpy(np.array(cells, dtype=np.float32)).div(255).clamp(0, 1)
