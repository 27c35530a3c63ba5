"""Matrix products with an fp32 result."""

import torch
from torch import Tensor


def product_in_fp32(left: Tensor, right: Tensor) -> Tensor:
    """Returns left @ right in fp32, without rounding in between.

    On CUDA, 16-bit matrices are multiplied at 16-bit speed: the tensor cores accumulate in fp32 anyway.
    """
    # Meta tensors take the CUDA path, because running a step on meta predicts the memory of a CUDA device.
    if (left.is_cuda or left.is_meta) and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
