"""LayerNorm with modulation and the gated residual in plain torch: the definition and the CPU path.

FLUX's and SD3's blocks use both. Everything is computed in fp32 (in fp64 for fp64 inputs,
which tests use) and the result is rounded once. diffusers rounds after every step instead;
a single rounding is closer to exact arithmetic.
"""

import torch
from torch import Tensor

from halfbyte.kernels.precision import to_wide

# The largest finite fp16 value. diffusers clips the residual stream to it.
FP16_LARGEST = 65504.0


def _rows(modulation: Tensor) -> Tensor:
    """Returns modulation (B, D) as (B, 1, D) in the working precision, to broadcast over (B, S, D)."""
    return to_wide(modulation)[:, None]


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns x with mean 0 and variance 1 along its last dimension, and the factor 1 / std (..., 1)."""
    centred = to_wide(x)
    centred = centred - centred.mean(-1, keepdim=True)
    factor = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * factor, factor


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Returns LN(x) * (1 + scale) + shift of x (B, S, D), scale and shift (B, D)."""
    normalized, _ = _normalize(x, eps)
    return (normalized * (1 + _rows(scale)) + _rows(shift)).to(x.dtype)


def layer_norm_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, residual_grad: Tensor | None, eps: float
) -> Tensor:
    """Returns dx (B, S, D), with `residual_grad` (B, S, D) added before the rounding.

    With n = LN(x), g = dy * (1 + scale) and means over D:  dx = (g - mean(g) - n * mean(g * n)) / std.
    """
    normalized, factor = _normalize(x, eps)
    grad = to_wide(dy) * (1 + _rows(scale))
    # Remove the parts of g along the constant vector and along n: LN does not
    # react to x moving in those directions.
    grad = grad - grad.mean(-1, keepdim=True) - normalized * (grad * normalized).mean(-1, keepdim=True)
    grad = grad * factor
    return (grad if residual_grad is None else grad + to_wide(residual_grad)).to(x.dtype)


def layer_norm_modulate_grads(
    dy: Tensor, x: Tensor, scale: Tensor, residual_grad: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `layer_norm_modulate_backward`'s dx, and dscale and dshift (B, D) in scale's dtype."""
    normalized, _ = _normalize(x, eps)
    dscale = (to_wide(dy) * normalized).sum(1).to(scale.dtype)
    dshift = to_wide(dy).sum(1).to(scale.dtype)
    return layer_norm_modulate_backward(dy, x, scale, residual_grad, eps), dscale, dshift


def gated_residual(x: Tensor, gate: Tensor, update: Tensor, clip: bool) -> Tensor:
    """Returns x + gate * update; x, update (B, S, D), gate (B, D). `clip` limits fp16 to its finite range."""
    y = to_wide(x) + _rows(gate) * to_wide(update)
    if clip and x.dtype == torch.float16:
        y = y.clamp(-FP16_LARGEST, FP16_LARGEST)
    return y.to(x.dtype)


def gated_residual_backward(dy: Tensor, gate: Tensor) -> Tensor:
    """Returns the gradient of the update, gate * dy (B, S, D)."""
    return (_rows(gate) * to_wide(dy)).to(dy.dtype)


def gated_residual_grads(dy: Tensor, gate: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the update (B, S, D) and of the gate (B, D)."""
    return gated_residual_backward(dy, gate), (to_wide(dy) * to_wide(update)).sum(1).to(gate.dtype)
