"""RMSNorm and rotary position embedding (RoPE) of queries and keys in plain torch, forward and backward.

Per head and token, with the RMSNorm weight w and the rotation R of the token's position:

    q = R (w * x * r),   r = 1 / sqrt(mean(x^2) + eps)

The backward goes the other way: multiply the gradient with R^T, then apply RMSNorm's gradient. w is frozen.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.kernels.precision import to_wide


def _rms_factor(x: Tensor, eps: float) -> Tensor:
    """Returns r = 1 / sqrt(mean(x^2) + eps) over the last dimension, kept with size 1."""
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates interleaved pairs of x (B, S, H, D_h) by cos and sin (S, D_h).

    (a, b) -> (a cos - b sin, b cos + a sin)
    """
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return x * cos[:, None].to(x.dtype) + turned * sin[:, None].to(x.dtype)


def _rotate_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multiplies with the transpose of `_rotate`, valid for any cos and sin.

    The output pair (a', b') = (a cos_0 - b sin_0, b cos_1 + a sin_1) has the transpose (da, db) = (cos_0 da'
    + sin_1 db', cos_1 db' - sin_0 da'), so sin is multiplied before the pair is swapped.
    """
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
    """Applies RMSNorm and RoPE to the streams' q (or k), each (B, S_i, H*D_h): joint (B, sum S_i, H, D_h).

    `weights` holds one RMSNorm weight (D_h,) for each stream, or is empty for no norm.
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
    """Returns each stream's projection gradient (B, S_i, H*D_h) from the joint one (B, sum S_i, H, D_h).

    RMSNorm y = w * x * r has the gradient, with g = w * dy and the mean over D_h:
    dx = r * (g - x * r^2 * mean(g * x)).
    """
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
