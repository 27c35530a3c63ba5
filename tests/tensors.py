"""Tensors to compute with, the same in each run, and how far results are from what they should be."""

import torch
from torch import Tensor


def noise(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, requires_grad: bool = False
) -> Tensor:
    """Normal numbers, drawn in fp32 whatever the dtype."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.requires_grad_(requires_grad)


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """The norm of the difference as a share of that of `expected`, in float64."""
    return ((ours.double() - expected).norm() / expected.norm()).item()
