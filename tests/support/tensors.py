"""Tensors to compute with, the same in each run, and how far results are from what they should be."""

from pathlib import Path

import torch
from safetensors.torch import load_file
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


def assert_same_tensors(one: Path, other: Path) -> None:
    """That two files hold the same, bit by bit."""
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
