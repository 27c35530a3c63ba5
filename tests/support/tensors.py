"""Reproducible random tensors, and comparisons of results with expected values."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def noise(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, requires_grad: bool = False
) -> Tensor:
    """Returns normal numbers, generated in fp32 for every dtype."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.requires_grad_(requires_grad)


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """Returns the norm of the difference relative to that of `expected`, in float64."""
    return ((ours.double() - expected).norm() / expected.norm()).item()


def assert_same_tensors(one: Path, other: Path) -> None:
    """Checks that two files have the same names and bitwise identical tensors."""
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
