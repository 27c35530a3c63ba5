"""Low-rank adapters on frozen linear layers, as one autograd function for one layer or several that share x.

    y = x W^T + b + s (x A^T) B^T

The forward saves x and u = x A^T (M, rank) in the compute dtype, and A and s B cast to it. W is not saved:
the backward reads the frozen weight again, packed or not. With g = dL/dy:

    dL/dx = g W + (s g B) A        dL/dA = (s g B)^T x        dL/dB = s g^T u

The adapter's product is computed first, and the base's product is added into it. A matrix product that adds
into its output sums in fp32 and rounds once, so only the adapter's term, the smaller one, is rounded twice.
In the opposite order the base's term would be rounded twice, and y would carry two rounding errors of its own
magnitude. The same holds for dL/dx.

A is stacked over the layers, so u and dL/dA take one product each. The scale multiplies B in fp32, before B
is rounded to the compute dtype, so no tensor of the size of y or x has to be scaled.
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
    """A frozen weight and its adapter."""

    weight: FrozenWeight
    bias: Tensor | None  # (N,)
    down: Tensor  # A (rank, K)
    up: Tensor  # B (N, rank)
    scale: float  # s, which multiplies B A


def low_rank_linears(
    x: Tensor, layers: Sequence[AdaptedWeight], dropped: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Computes y (M, N) in x's dtype for each layer from x (M, K); differentiable in x, biases, A and B.

    `dropped` (M, K) is x after the adapters' dropout. The adapters read it in place of x, and the backward
    saves it in place of x.
    """
    # autograd.Function finds its inputs only among its direct arguments: the trainable tensors go in as a
    # flat list of bias, A, B for each layer, and the frozen weights in a tuple that autograd does not look
    # into.
    bases = tuple((layer.weight, layer.scale) for layer in layers)
    tensors = [tensor for layer in layers for tensor in (layer.bias, layer.down, layer.up)]
    if is_differentiated(x, dropped, *tensors):
        outputs: tuple[Tensor, ...] = _LowRankLinears.apply(x, dropped, bases, *tensors)
        return outputs
    return _products(x, x if dropped is None else dropped, bases, tensors)[0]


def _products(
    x: Tensor,
    adapter_input: Tensor,
    bases: tuple[tuple[FrozenWeight, float], ...],
    tensors: Sequence[Tensor | None],
) -> tuple[tuple[Tensor, ...], Tensor, Tensor, list[Tensor]]:
    """Computes the outputs, and the tensors that the backward saves in addition to the input.

    tensors: bias, A and B of each layer, flat. Returns the outputs, u (M, sum of ranks), A stacked (sum of
    ranks, K), and s B (N, rank) of each layer; all in x's dtype.
    """
    downs = [down for down in tensors[1::3] if down is not None]
    down = (downs[0] if len(downs) == 1 else torch.cat(downs)).to(x.dtype)
    u = adapter_input @ down.t()
    ups, outputs = [], []
    for (weight, scale), bias, up, part in zip(
        bases, tensors[0::3], tensors[2::3], _split(u, [down.shape[0] for down in downs], 1), strict=True
    ):
        assert up is not None
        # s B is scaled in fp32 and then rounded. With s = 1 no fp32 copy is needed.
        up = (up if scale == 1 else up.float() * scale).to(x.dtype)
        # y = u (s B)^T + b first, then y += x W^T: only the smaller term is rounded twice.
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
        adapter_input = x if dropped is None else dropped
        outputs, u, down, ups = _products(x, adapter_input, bases, tensors)
        ctx.save_for_backward(adapter_input, u, down, *ups)
        # Frozen weights live as long as the model, so ctx keeps only references. save_for_backward would pass
        # them to the hooks on saved tensors, and activation offloading would copy them to the host.
        ctx.bases = bases
        ctx.has_dropped = dropped is not None
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.ranks = [down.shape[0] for down in tensors[1::3] if down is not None]
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        adapter_input, u, down, *ups = ctx.saved_tensors
        with without_autocast(u.device.type):
            return _gradients(ctx, grads, adapter_input, u, down, ups)


def _split(stacked: Tensor, ranks: list[int], dim: int) -> tuple[Tensor, ...]:
    """Splits a dimension of the size of the sum of ranks into the parts of the layers."""
    return (stacked,) if len(ranks) == 1 else stacked.split(ranks, dim)


def _gradients(
    ctx: Any, grads: tuple[Tensor, ...], adapter_input: Tensor, u: Tensor, down: Tensor, ups: list[Tensor]
) -> tuple[Any, ...]:
    """Returns the gradients of forward's arguments: x, dropped, bases, then bias, A and B of each layer."""
    wanted, dtypes, ranks = ctx.needs_input_grad, ctx.dtypes, ctx.ranks
    parts = [grad @ up for grad, up in zip(grads, ups, strict=True)]  # s g B of each layer, (M, rank)
    part = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    # (s g B) A, summed over the layers by the product itself, since both factors are stacked.
    grad_adapter_input = part @ down if wanted[0] or wanted[1] else None
    # With dropout the adapters' term is the gradient of `dropped`; without it, it is the first term of dx.
    grad_x, grad_dropped = (None, grad_adapter_input) if ctx.has_dropped else (grad_adapter_input, None)
    if wanted[0]:
        for grad, (weight, _) in zip(grads, ctx.bases, strict=True):
            # dx += g W, in the memory of the first term.
            grad_x = _add_input_grad(grad_x, grad, weight)
    # dA of all layers in one product, (s g B)^T x.
    grad_downs = _split(part.t() @ adapter_input, ranks, 0) if any(wanted[4::3]) else [None] * len(ranks)
    results: list[Tensor | None] = []
    for index, (grad, (_, scale), u_part, grad_down) in enumerate(
        zip(grads, ctx.bases, _split(u, ranks, 1), grad_downs, strict=True)
    ):
        first = 3 + 3 * index  # this layer's bias among forward's arguments; A and B follow it
        grad_bias = grad_up = None
        if wanted[first]:
            grad_bias = grad.sum(0, dtype=torch.float32).to(dtypes[3 * index])
        if wanted[first + 2]:
            # dB = s g^T u. u is small and unscaled, so s multiplies the product, in B's own dtype.
            grad_up = (grad.t() @ u_part).to(dtypes[3 * index + 2])
            grad_up = grad_up if scale == 1 else grad_up * scale
        if grad_down is not None:
            grad_down = grad_down.to(dtypes[3 * index + 1]) if wanted[first + 1] else None
        results += [grad_bias, grad_down, grad_up]
    return grad_x, grad_dropped, None, *results


def _add_output(total: Tensor, x: Tensor, weight: FrozenWeight) -> None:
    """Adds x W^T to `total` in place."""
    if isinstance(weight, PackedWeight):
        accumulate_ops.add_linear_4bit(total, x, weight)
    elif isinstance(weight, Int8Weight):
        # The int8 product accumulates in int32 and is scaled afterwards, so it cannot add into `total`.
        with without_autocast(x.device.type):
            total.add_(int8_ops.linear_int8(x, weight.quantized, weight.absmax, None, weight.threshold))
    else:
        accumulate_ops.add_product(total, x, weight.to(x.dtype).t())


def _add_input_grad(total: Tensor | None, grad: Tensor, weight: FrozenWeight) -> Tensor:
    """Adds grad W to `total` in place and returns it; returns a new tensor grad W if `total` is None."""
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
