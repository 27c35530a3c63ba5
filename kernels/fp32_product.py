"""Products that keep an fp32 result."""

import torch
from torch import Tensor


def product_in_fp32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32, not rounded on the way; of 16-bit matrices on CUDA at their own speed."""
    # On meta as on CUDA, whose memory is planned there.
    if (left.is_cuda or left.is_meta) and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
