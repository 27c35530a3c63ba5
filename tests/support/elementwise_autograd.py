"""The blocks' elementwise functions with gradients, for use outside the blocks' own backward.

Each saves inputs alone and computes statistics again. Gradients of modulation are computed only where asked for.
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
    """What `_QkNormRope` was given flat, for autograd looks for tensors among the arguments only."""
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
        flat = [grad for of_stream in grads for grad in (*of_stream, None, None)]
        return (None, None, None, *flat)


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Tensor:
    """`modulation_ops.layer_norm_modulate`, differentiable in all three."""
    return _LayerNormModulate.apply(x, scale, shift, eps)


def gated_residual(x: Tensor, gate: Tensor, update: Tensor, *, clip: bool = False) -> Tensor:
    """`modulation_ops.gated_residual`, differentiable in all three; the gradient passes by the clip."""
    return _GatedResidual.apply(x, gate, update, clip)


def gelu_tanh(x: Tensor) -> Tensor:
    """`gelu_ops.gelu_tanh`, differentiable."""
    return _GeluTanh.apply(x)


def qk_norm_rope(
    streams: Sequence[Stream], rope: tuple[Tensor, Tensor] | None, *, heads: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_rope_ops.qk_norm_rope`, differentiable in the projections; norm weights and angles are frozen."""
    parts = [part for stream in streams for part in stream]
    return _QkNormRope.apply(rope, heads, eps, *parts)
