"""GELU with the tanh approximation, forward and backward, in plain torch."""

import math

import torch
from torch import Tensor

from halfbyte.kernels.precision import to_wide

_GELU_SCALE = math.sqrt(2.0 / math.pi)

_GELU_CUBIC = 0.044715


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form, 0.5 x (1 + tanh(u)), as x sigmoid(2u): no cancellation where x is far below zero."""
    wide = to_wide(x)
    u = _GELU_SCALE * (wide + _GELU_CUBIC * wide.pow(3))
    return (wide * torch.sigmoid(2 * u)).to(x.dtype)


def gelu_tanh_backward(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, from x."""
    wide = to_wide(x)
    u = _GELU_SCALE * (wide + _GELU_CUBIC * wide.pow(3))
    slope = _GELU_SCALE * (1 + 3 * _GELU_CUBIC * wide.square())
    open_, closed = torch.sigmoid(2 * u), torch.sigmoid(-2 * u)
    return (to_wide(dy) * (open_ + wide * open_ * closed * 2 * slope)).to(x.dtype)


def gelu_tanh_gradients(dy: Tensor, x: Tensor, gb: Tensor, xa: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x (M, D), with gb^T gelu(x) (P, D) and dx^T xa (D, U), neither of them rounded."""
    dx = gelu_tanh_backward(dy, x)
    return dx, to_wide(gb).t() @ to_wide(gelu_tanh(x)), to_wide(dx).t() @ to_wide(xa)
