"""GELU with the tanh approximation, forward and backward, in plain torch.

    gelu(x) = 0.5 x (1 + tanh(u)),  u = sqrt(2 / pi) (x + 0.044715 x^3)

Since (1 + tanh(u)) / 2 = sigmoid(2u), this is gelu(x) = x sigmoid(2u). The sigmoid form does not cancel for
very negative x, where 1 + tanh(u) would lose all its digits.
"""

import math

import torch
from torch import Tensor

from halfbyte.kernels.precision import to_wide

_GELU_SCALE = math.sqrt(2.0 / math.pi)

_GELU_CUBIC = 0.044715


def gelu_tanh(x: Tensor) -> Tensor:
    """Returns gelu(x) in x's dtype, computed in fp32 as x sigmoid(2u)."""
    wide = to_wide(x)
    u = _GELU_SCALE * (wide + _GELU_CUBIC * wide.pow(3))
    return (wide * torch.sigmoid(2 * u)).to(x.dtype)


def gelu_tanh_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Returns the gradient of x from the output's gradient `dy` and x itself.

    With s = sigmoid(2u): ds/dx = s (1 - s) 2 u', u' = sqrt(2 / pi) (1 + 3 * 0.044715 x^2), so
    gelu'(x) = s + x s (1 - s) 2 u'.
    """
    wide = to_wide(x)
    u = _GELU_SCALE * (wide + _GELU_CUBIC * wide.pow(3))
    slope = _GELU_SCALE * (1 + 3 * _GELU_CUBIC * wide.square())
    # 1 - sigmoid(2u) = sigmoid(-2u): computed separately, it is accurate also where sigmoid(2u) rounds to 1.
    gate, complement = torch.sigmoid(2 * u), torch.sigmoid(-2 * u)
    return (to_wide(dy) * (gate + wide * gate * complement * 2 * slope)).to(x.dtype)


def gelu_tanh_gradients(dy: Tensor, x: Tensor, gb: Tensor, xa: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (dx (M, D), gb^T gelu(x) (P, D), dx^T xa (D, U)); the two products stay in fp32.

    They are the gradients of the neighboring adapters' matrices;
    `halfbyte.kernels.gelu.ops.gelu_tanh_gradients` explains which. dx and gelu(x) are rounded to x's dtype
    before the products, as separate calls would round them.
    """
    dx = gelu_tanh_backward(dy, x)
    return dx, to_wide(gb).t() @ to_wide(gelu_tanh(x)), to_wide(dx).t() @ to_wide(xa)
