"""The elementwise work of FLUX's and SD3's blocks in plain torch: the definition, and the CPU path.

All is computed in fp32 (in float64 for float64, which tests ask for) and rounded once, on the way out. diffusers
rounds after each of its steps instead; of the two, this is the nearer to exact arithmetic.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Largest finite fp16: diffusers clips the residual stream there.
FP16_LARGEST = 65504.0

_GELU_SCALE = math.sqrt(2.0 / math.pi)
_GELU_CUBIC = 0.044715


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rows(modulation: Tensor) -> Tensor:
    """(B, D) beside (B, S, D)."""
    return _wide(modulation)[:, None]


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x with mean 0 and variance 1 along its last dimension, and the factor (..., 1) that made it so."""
    centred = _wide(x)
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
    grad = _wide(dy) * (1 + _rows(scale))
    grad = grad - grad.mean(-1, keepdim=True) - normalized * (grad * normalized).mean(-1, keepdim=True)
    grad = grad * factor
    return (grad if residual_grad is None else grad + _wide(residual_grad)).to(x.dtype)


def layer_norm_modulate_grads(
    dy: Tensor, x: Tensor, scale: Tensor, residual_grad: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_norm_modulate_backward`'s dx with dscale and dshift (B, D)."""
    normalized, _ = _normalize(x, eps)
    dscale = (_wide(dy) * normalized).sum(1).to(scale.dtype)
    dshift = _wide(dy).sum(1).to(scale.dtype)
    return layer_norm_modulate_backward(dy, x, scale, residual_grad, eps), dscale, dshift


def gated_residual(x: Tensor, gate: Tensor, update: Tensor, clip: bool) -> Tensor:
    """x + gate * update: x and update (B, S, D), gate (B, D); `clip` holds fp16 within its finite range."""
    y = _wide(x) + _rows(gate) * _wide(update)
    if clip and x.dtype == torch.float16:
        y = y.clamp(-FP16_LARGEST, FP16_LARGEST)
    return y.to(x.dtype)


def gated_residual_backward(dy: Tensor, gate: Tensor) -> Tensor:
    """gate * dy: the gradient of the update."""
    return (_rows(gate) * _wide(dy)).to(dy.dtype)


def gated_residual_grads(dy: Tensor, gate: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the update (B, S, D) and of the gate (B, D)."""
    return gated_residual_backward(dy, gate), (_wide(dy) * _wide(update)).sum(1).to(gate.dtype)


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


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form, 0.5 x (1 + tanh(u)), as x sigmoid(2u): no cancellation where x is far below zero."""
    wide = _wide(x)
    u = _GELU_SCALE * (wide + _GELU_CUBIC * wide.pow(3))
    return (wide * torch.sigmoid(2 * u)).to(x.dtype)


def gelu_tanh_backward(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, from x."""
    wide = _wide(x)
    u = _GELU_SCALE * (wide + _GELU_CUBIC * wide.pow(3))
    slope = _GELU_SCALE * (1 + 3 * _GELU_CUBIC * wide.square())
    open_, closed = torch.sigmoid(2 * u), torch.sigmoid(-2 * u)
    return (_wide(dy) * (open_ + wide * open_ * closed * 2 * slope)).to(x.dtype)


def gelu_tanh_gradients(
    dy: Tensor, x: Tensor, lowered: Tensor, lifted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x (M, D), with lowered^T gelu(x) (P, D) and dx^T lifted (D, U), neither of them rounded."""
    dx = gelu_tanh_backward(dy, x)
    return dx, _wide(lowered).t() @ _wide(gelu_tanh(x)), _wide(dx).t() @ _wide(lifted)


def _rms_factor(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, S, H, D_h) in interleaved pairs: (a, b) -> (a cos - b sin, b cos + a sin); cos and sin (S, D_h)."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return x * cos[:, None].to(x.dtype) + turned * sin[:, None].to(x.dtype)


def _rotate_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of `_rotate`, whatever cos and sin hold."""
    first, second = (grad * sin[:, None].to(grad.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    return grad * cos[:, None].to(grad.dtype) + torch.stack([second, -first], dim=-1).flatten(-2)


def norm_rope(
    projections: Sequence[Tensor],
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    eps: float,
) -> Tensor:
    """The streams' q (or k), each (B, S_i, H*D_h), after RMSNorm and rope: joint (B, sum S_i, H, D_h).

    `weights` holds one RMSNorm weight (D_h,) a stream, or none.
    """
    streams = []
    for number, projection in enumerate(projections):
        x = _wide(projection).unflatten(-1, (heads, -1))
        if weights:
            x = x * _rms_factor(x, eps) * _wide(weights[number])
        streams.append(x)
    joint = torch.cat(streams, dim=1)
    if cos is not None and sin is not None:
        joint = _rotate(joint, cos, sin)
    return joint.to(projections[0].dtype)


def norm_rope_backward(
    grad: Tensor,
    projections: Sequence[Tensor],
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """Joint gradient (B, sum S_i, H, D_h) -> the gradient of each stream's projection (B, S_i, H*D_h)."""
    joint = _wide(grad)
    if cos is not None and sin is not None:
        joint = _rotate_back(joint, cos, sin)
    grads = []
    streams = joint.split([projection.shape[1] for projection in projections], dim=1)
    for number, (projection, g) in enumerate(zip(projections, streams, strict=True)):
        if weights:
            x = _wide(projection).unflatten(-1, (grad.shape[2], -1))
            factor = _rms_factor(x, eps)
            g = g * _wide(weights[number])
            g = factor * (g - x * factor.square() * (g * x).mean(-1, keepdim=True))
        grads.append(g.flatten(2).to(projection.dtype, memory_format=torch.contiguous_format, copy=True))
    return grads
