"""Checks of the operands of the int8 ops."""

import torch
from torch import Tensor

from halfbyte.kernels.rows import check_tensor


def check_int8(quantized: Tensor, absmax: Tensor) -> None:
    """Checks a weight of LLM.int8(): int8 (N, K) and the fp32 absmax (N,) of its rows.

    Raises:
        ValueError: with the name of the argument that does not fit.
    """
    if quantized.dtype is not torch.int8 or quantized.dim() != 2:
        raise ValueError(
            f"quantized: got {quantized.dtype} {tuple(quantized.shape)}, expected torch.int8 (N, K)"
        )
    check_tensor("absmax", absmax, torch.float32, quantized.shape[0], quantized.get_device())
