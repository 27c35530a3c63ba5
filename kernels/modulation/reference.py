"""The elementwise work of FLUX's and SD3's blocks in plain torch: the definition, and the CPU path.

All is computed in fp32 (in float64 for float64, which tests ask for) and rounded once, on the way out. diffusers
rounds after each of its steps instead; of the two, this is the nearer to exact arithmetic.
"""

import torch
from torch import Tensor

from halfbyte.kernels.precision import to_wide

# Largest finite fp16: diffusers clips the residual stream there.
FP16_LARGEST = 65504.0


def _rows(modulation: Tensor) -> Tensor:
    """(B, D) beside (B, S, D)."""
    return to_wide(modulation)[:, None]


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x with mean 0 and variance 1 along its last dimension, and the factor (..., 1) that made it so."""
    centred = to_wide(x)
    centred = centred - centred.mean(-1, keepdim=True)
    factor = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * factor, factor


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LN(x) * (1 + scale) + shift: x (B, S, D), scale and shift (B, D)."""
    normalized, _ = _normalize(x, eps)
    return (normalized * (1 + _rows(scale)) + _rows(shift)).to(x.dtype)


def layer_norm_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, residual_grad: Tensor | None, eps: float
) -> Tensor:
    """dx (B, S, D), with `residual_grad` (B, S, D) added before it is rounded."""
    normalized, factor = _normalize(x, eps)
    grad = to_wide(dy) * (1 + _rows(scale))
    grad = grad - grad.mean(-1, keepdim=True) - normalized * (grad * normalized).mean(-1, keepdim=True)
    grad = grad * factor
    return (grad if residual_grad is None else grad + to_wide(residual_grad)).to(x.dtype)


def layer_norm_modulate_grads(
    dy: Tensor, x: Tensor, scale: Tensor, residual_grad: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_norm_modulate_backward`'s dx with dscale and dshift (B, D)."""
    normalized, _ = _normalize(x, eps)
    dscale = (to_wide(dy) * normalized).sum(1).to(scale.dtype)
    dshift = to_wide(dy).sum(1).to(scale.dtype)
    return layer_norm_modulate_backward(dy, x, scale, residual_grad, eps), dscale, dshift


def gated_residual(x: Tensor, gate: Tensor, update: Tensor, clip: bool) -> Tensor:
    """x + gate * update: x and update (B, S, D), gate (B, D); `clip` holds fp16 within its finite range."""
    y = to_wide(x) + _rows(gate) * to_wide(update)
    if clip and x.dtype == torch.float16:
        y = y.clamp(-FP16_LARGEST, FP16_LARGEST)
    return y.to(x.dtype)


def gated_residual_backward(dy: Tensor, gate: Tensor) -> Tensor:
    """gate * dy: the gradient of the update."""
    return (_rows(gate) * to_wide(dy)).to(dy.dtype)


def gated_residual_grads(dy: Tensor, gate: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the update (B, S, D) and of the gate (B, D)."""
    return gated_residual_backward(dy, gate), (to_wide(dy) * to_wide(update)).sum(1).to(gate.dtype)


def gated_norm(
    x: Tensor, gate: Tensor, update: Tensor, scale: Tensor, shift: Tensor, eps: float, clip: bool
) -> tuple[Tensor, Tensor]:
    """(y = x + gate * update, LN(y) * (1 + scale) + shift); the norm sees y as it is stored."""
    y = gated_residual(x, gate, update, clip)
    return y, layer_norm_modulate(y, scale, shift, eps)


def gated_norm_backward(
    dnormed: Tensor, y: Tensor, gate: Tensor, scale: Tensor, residual_grad: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(the gradient of x, which is y's; the gradient of the update)."""
    dy = layer_norm_modulate_backward(dnormed, y, scale, residual_grad, eps)
    return dy, gated_residual_backward(dy, gate)
