"""Wraps the blocks' elementwise ops in autograd functions, for tests outside the blocks' own backward.

Each saves only inputs and recomputes statistics in its backward. Modulation
gets gradients only if it requires them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.gelu import ops as gelu_ops
from halfbyte.kernels.modulation import ops as modulation_ops
from halfbyte.kernels.qk_rope import ops as qk_rope_ops
from halfbyte.kernels.qk_rope.ops import Stream


class _LayerNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.eps = eps
        ctx.shift_dtype = shift.dtype
        return modulation_ops.layer_norm_modulate(x, scale, shift, eps=eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        if not any(ctx.needs_input_grad[1:3]):
            return modulation_ops.layer_norm_modulate_backward(dy, x, scale, eps=ctx.eps), None, None, None
        dx, dscale, dshift = modulation_ops.layer_norm_modulate_grads(dy, x, scale, eps=ctx.eps)
        return dx, dscale, dshift.to(ctx.shift_dtype), None


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, update: Tensor, clip: bool) -> Tensor:
        ctx.save_for_backward(gate, update if ctx.needs_input_grad[1] else None)
        ctx.update_dtype = update.dtype
        return modulation_ops.gated_residual(x, gate, update, clip=clip)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, update = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            dupdate = modulation_ops.gated_residual_backward(dy, gate)
            return dy, None, dupdate.to(ctx.update_dtype), None
        dupdate, dgate = modulation_ops.gated_residual_grads(dy, gate, update)
        return dy, dgate, dupdate.to(ctx.update_dtype), None


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return gelu_ops.gelu_tanh(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return gelu_ops.gelu_tanh_backward(dy, *ctx.saved_tensors)


def _streams(parts: Sequence[Tensor | None]) -> list[Stream]:
    """Rebuilds streams from `_QkNormRope`'s arguments, which are flat because autograd needs direct tensors."""
    streams = []
    for start in range(0, len(parts), len(Stream._fields)):
        query, key, *others = parts[start : start + len(Stream._fields)]
        assert query is not None
        assert key is not None
        streams.append(Stream(query, key, *others))
    return streams


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rope: tuple[Tensor, Tensor] | None,
        heads: int,
        eps: float,
        *parts: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        streams = _streams(parts)
        kept = [part for stream in streams for part in stream._replace(value=None)]
        ctx.save_for_backward(*(rope or (None, None)), *kept)
        ctx.eps = eps
        return qk_rope_ops.qk_norm_rope(streams, rope, heads=heads, eps=eps)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, *parts = ctx.saved_tensors
        rope = None if cos is None else (cos, sin)
        grads = qk_rope_ops.qk_norm_rope_backward(dq, dk, dv, _streams(parts), rope, eps=ctx.eps)
        flat = [grad for grads_of_stream in grads for grad in (*grads_of_stream, None, None)]
        return (None, None, None, *flat)


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Computes `modulation_ops.layer_norm_modulate`, differentiable in all three tensors."""
    return _LayerNormModulate.apply(x, scale, shift, eps)


def gated_residual(x: Tensor, gate: Tensor, update: Tensor, *, clip: bool = False) -> Tensor:
    """Computes `modulation_ops.gated_residual`, differentiable in all tensors; the gradient ignores the clip."""
    return _GatedResidual.apply(x, gate, update, clip)


def gelu_tanh(x: Tensor) -> Tensor:
    """Computes `gelu_ops.gelu_tanh`, differentiable."""
    return _GeluTanh.apply(x)


def qk_norm_rope(
    streams: Sequence[Stream], rope: tuple[Tensor, Tensor] | None, *, heads: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `qk_rope_ops.qk_norm_rope`, differentiable in the projections only."""
    parts = [part for stream in streams for part in stream]
    return _QkNormRope.apply(rope, heads, eps, *parts)
