"""RMS norm and rotary embedding of queries and keys, forward and backward, in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.kernels.precision import to_wide


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
        x = to_wide(projection).unflatten(-1, (heads, -1))
        if weights:
            x = x * _rms_factor(x, eps) * to_wide(weights[number])
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
    joint = to_wide(grad)
    if cos is not None and sin is not None:
        joint = _rotate_back(joint, cos, sin)
    grads = []
    streams = joint.split([projection.shape[1] for projection in projections], dim=1)
    for number, (projection, g) in enumerate(zip(projections, streams, strict=True)):
        if weights:
            x = to_wide(projection).unflatten(-1, (grad.shape[2], -1))
            factor = _rms_factor(x, eps)
            g = g * to_wide(weights[number])
            g = factor * (g - x * factor.square() * (g * x).mean(-1, keepdim=True))
        grads.append(g.flatten(2).to(projection.dtype, memory_format=torch.contiguous_format, copy=True))
    return grads
