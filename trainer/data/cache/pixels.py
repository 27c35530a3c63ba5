"""The pixels of views: decoded to bytes, in a worker process perhaps, and made the VAE's input on its device."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.trainer.data.pictures.decode import decode, scaled
from halfbyte.trainer.data.sources.contents import sample_bytes
from halfbyte.trainer.data.views.buckets import View


def decoded_view(view: View) -> NDArray[np.uint8]:
    """Returns the crop of the upright image, scaled and mirrored, (H, W, 3).

    In bytes, because they are moved between processes. Raises DataError if the image changed since it was read.
    """
    image = decode(sample_bytes(view.sample), view.box)
    return scaled(image, (view.width, view.height), flip=view.flip)


def unit_pixels(values: Tensor, device: torch.device) -> Tensor:
    """Converts pixels (B, H, W, 3) uint8 to (B, 3, H, W) fp32 in [-1, 1] on a device.

    By a table, so that they are bitwise the same everywhere: a GPU divides by a constant by multiplying.
    """
    table = torch.arange(256, dtype=torch.float32).div(127.5).sub(1.0).to(device)
    if device.type == "cuda":
        values = values.pin_memory()  # so that the copy does not wait for the device's earlier work
    places = values.to(device, non_blocking=True).permute(0, 3, 1, 2).to(torch.int32).contiguous()
    return table[places]
