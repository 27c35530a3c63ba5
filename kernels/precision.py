"""The working precision of the reference implementations."""

import torch
from torch import Tensor


def to_wide(x: Tensor) -> Tensor:
    """Converts to fp32; fp64 stays fp64, so that tests can compare with exact results."""
    return x if x.dtype == torch.float64 else x.float()
