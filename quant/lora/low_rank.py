"""y = x W^T + b + s (x A^T) B^T as one autograd function, for one layer or for several that share x.

Backward keeps x and u = x A^T (rows x rank) in the compute dtype, and the casts of the small A and B; W is read
again where it lies, packed or not. With g = dL/dy:

    dL/dx = g W + (s g B) A        dL/dA = (s g B)^T x        dL/dB = s g^T u

The adapter's product comes first and the base's is added to it. A matrix product that adds into its output does so
in fp32 and rounds the sum once, so what is rounded twice is the smaller term: the other way round it would be the
base's, and y would carry two roundings of its own size. The same holds for dL/dx.

A is stacked over the layers, so that u and dL/dA take one product each. The scale goes into B in fp32, before B is
rounded to the compute dtype: nothing of the size of y or x is scaled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import is_differentiated
from halfbyte.kernels.int8 import ops as int8_ops
from halfbyte.kernels.int8.ops import Int8Weight
from halfbyte.kernels.linear_4bit import accumulate_ops
from halfbyte.kernels.linear_4bit import ops as linear_ops
from halfbyte.kernels.quantize_4bit.packed_weight import PackedWeight
from halfbyte.quant.layers.autocast import without_autocast

FrozenWeight = Tensor | PackedWeight | Int8Weight  # (N, K)


@dataclass(frozen=True, eq=False)
class AdaptedWeight:
    """A frozen weight and the adapter on it."""

    weight: FrozenWeight
    bias: Tensor | None  # (N,)
    down: Tensor  # A (rank, K)
    up: Tensor  # B (N, rank)
    scale: float  # of the update


def low_rank_linears(
    x: Tensor, layers: Sequence[AdaptedWeight], dropped: Tensor | None = None
) -> tuple[Tensor, ...]:
    """x (M, K) -> (M, N) in x's dtype for each layer; differentiable in x, biases, A and B.

    `dropped` (M, K) is what the adapters see in place of x where their input goes through dropout; x itself is
    not kept then.
    """
    bases = tuple((layer.weight, layer.scale) for layer in layers)
    tensors = [tensor for layer in layers for tensor in (layer.bias, layer.down, layer.up)]
    if is_differentiated(x, dropped, *tensors):
        outputs: tuple[Tensor, ...] = _LowRankLinears.apply(x, dropped, bases, *tensors)
        return outputs
    return _products(x, x if dropped is None else dropped, bases, tensors)[0]


def _products(
    x: Tensor, seen: Tensor, bases: tuple[tuple[FrozenWeight, float], ...], tensors: Sequence[Tensor | None]
) -> tuple[tuple[Tensor, ...], Tensor, Tensor, list[Tensor]]:
    """(outputs, u, A stacked in the compute dtype, s B of each layer in it); tensors are each layer's bias, A and B."""
    downs = [down for down in tensors[1::3] if down is not None]
    down = (downs[0] if len(downs) == 1 else torch.cat(downs)).to(x.dtype)
    u = seen @ down.t()
    ups, outputs = [], []
    for (weight, scale), bias, up, part in zip(
        bases, tensors[0::3], tensors[2::3], _split(u, [down.shape[0] for down in downs], 1), strict=True
    ):
        assert up is not None
        up = (up if scale == 1 else up.float() * scale).to(x.dtype)
        y = part @ up.t() if bias is None else torch.addmm(bias.to(x.dtype), part, up.t())
        _add_output(y, x, weight)
        ups.append(up)
        outputs.append(y)
    return tuple(outputs), u, down, ups


class _LowRankLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        bases: tuple[tuple[FrozenWeight, float], ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        seen = x if dropped is None else dropped
        outputs, u, down, ups = _products(x, seen, bases, tensors)
        ctx.save_for_backward(seen, u, down, *ups)
        # Frozen weights are kept by reference alone: hooks on saved tensors (offloading) have no need of them.
        ctx.bases = bases
        ctx.has_dropped = dropped is not None
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.ranks = [down.shape[0] for down in tensors[1::3] if down is not None]
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        seen, u, down, *ups = ctx.saved_tensors
        with without_autocast(u.device.type):
            return _gradients(ctx, grads, seen, u, down, ups)


def _split(stacked: Tensor, ranks: list[int], dim: int) -> tuple[Tensor, ...]:
    """What belongs to each layer of a dimension that has the sum of ranks."""
    return (stacked,) if len(ranks) == 1 else stacked.split(ranks, dim)


def _gradients(
    ctx: Any, grads: tuple[Tensor, ...], seen: Tensor, u: Tensor, down: Tensor, ups: list[Tensor]
) -> tuple[Any, ...]:
    wanted, dtypes, ranks = ctx.needs_input_grad, ctx.dtypes, ctx.ranks
    parts = [grad @ up for grad, up in zip(grads, ups, strict=True)]  # s g B of each layer
    part = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    grad_seen = part @ down if wanted[0] or wanted[1] else None
    grad_x, grad_dropped = (None, grad_seen) if ctx.has_dropped else (grad_seen, None)
    if wanted[0]:
        for grad, (weight, _) in zip(grads, ctx.bases, strict=True):
            grad_x = _add_input_grad(grad_x, grad, weight)
    grad_downs = _split(part.t() @ seen, ranks, 0) if any(wanted[4::3]) else [None] * len(ranks)
    results: list[Tensor | None] = []
    for index, (grad, (_, scale), u_part, grad_down) in enumerate(
        zip(grads, ctx.bases, _split(u, ranks, 1), grad_downs, strict=True)
    ):
        first = 3 + 3 * index
        grad_bias = grad_up = None
        if wanted[first]:
            grad_bias = grad.sum(0, dtype=torch.float32).to(dtypes[3 * index])
        if wanted[first + 2]:
            grad_up = (grad.t() @ u_part).to(dtypes[3 * index + 2])
            grad_up = grad_up if scale == 1 else grad_up * scale
        if grad_down is not None:
            grad_down = grad_down.to(dtypes[3 * index + 1]) if wanted[first + 1] else None
        results += [grad_bias, grad_down, grad_up]
    return grad_x, grad_dropped, None, *results


def _add_output(total: Tensor, x: Tensor, weight: FrozenWeight) -> None:
    """total += x W^T"""
    if isinstance(weight, PackedWeight):
        accumulate_ops.add_linear_4bit(total, x, weight)
    elif isinstance(weight, Int8Weight):
        # Its sum is one of int32 and is scaled afterwards, so there is none to add into.
        with without_autocast(x.device.type):
            total.add_(int8_ops.linear_int8(x, weight.quantized, weight.absmax, None, weight.threshold))
    else:
        accumulate_ops.add_product(total, x, weight.to(x.dtype).t())


def _add_input_grad(total: Tensor | None, grad: Tensor, weight: FrozenWeight) -> Tensor:
    """total + grad W, in total's memory where there is one."""
    if isinstance(weight, PackedWeight):
        if total is None:
            return linear_ops.linear_4bit_input_grad(grad, weight)
        accumulate_ops.add_linear_4bit_input_grad(total, grad, weight)
        return total
    if isinstance(weight, Int8Weight):
        part = int8_ops.linear_int8_input_grad(grad, weight.quantized, weight.absmax)
        return part if total is None else total.add_(part)
    weight = weight.to(grad.dtype)
    if total is None:
        return grad @ weight
    accumulate_ops.add_product(total, grad, weight)
    return total
