"""4-bit weights dequantized into a wider matrix and adapters laid out beside them, as torch sees it.

Of weights there is no reference to dispatch to: where the kernel cannot run, products are made layer by layer instead,
see `halfbyte.quant.lora.linear_group`. Tensors on meta stand for those of a CUDA device, whose memory is planned by
running a step without values.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import HAS_TRITON, is_eager
from halfbyte.kernels.quantize_4bit.packed_weight import SCHEMA, PackedWeight

if HAS_TRITON:
    from halfbyte.kernels.stacked import cuda_adapters as adapter_stack_triton
    from halfbyte.kernels.stacked import cuda_weight as stacked_triton

_WORD = 8  # 4-bit values

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define("stack_downs_(Tensor(a!) out, Tensor[] downs) -> ()")
_library.define("stack_ups_(Tensor(a!) out, Tensor[] ups, int[] starts, float[] scales) -> ()")
_library.define(
    f"stack_weight_(Tensor(a!) out, {SCHEMA}, Tensor? up, float scale, int first, int columns) -> ()"
)


def _stack_op(out: Tensor, *fields: Any) -> None:
    *weight, up, scale, first, columns = fields
    stacked_triton.stack_weight(out, PackedWeight.of(tuple(weight)), up, scale, first, columns)


_library.impl("stack_weight_", _stack_op, "CUDA")


def _stack_downs(out: Tensor, downs: Sequence[Tensor]) -> None:
    row = 0
    for down in downs:
        out[row : row + down.shape[0]] = down
        row += down.shape[0]
    out[row:] = 0


def _stack_ups(out: Tensor, ups: Sequence[Tensor], starts: Sequence[int], scales: Sequence[float]) -> None:
    out.zero_()
    first = 0
    for up, start, scale in zip(ups, starts, scales, strict=True):
        outputs, rank = up.shape
        out[start : start + outputs, first : first + rank] = up if scale == 1 else up.float() * scale
        first += rank


def _stack_downs_cuda(out: Tensor, downs: Sequence[Tensor]) -> None:
    run = adapter_stack_triton.stack_downs if _is_few(downs) else _stack_downs
    run(out, downs)


def _stack_ups_cuda(
    out: Tensor, ups: Sequence[Tensor], starts: Sequence[int], scales: Sequence[float]
) -> None:
    run = adapter_stack_triton.stack_ups if _is_few(ups) else _stack_ups
    run(out, ups, starts, scales)


def _is_few(adapters: Sequence[Tensor]) -> bool:
    return 0 < len(adapters) <= adapter_stack_triton.MOST_LAYERS


_library.impl("stack_downs_", _stack_downs, "CompositeExplicitAutograd")
_library.impl("stack_ups_", _stack_ups, "CompositeExplicitAutograd")
if HAS_TRITON:
    _library.impl("stack_downs_", _stack_downs_cuda, "CUDA")
    _library.impl("stack_ups_", _stack_ups_cuda, "CUDA")


@torch.library.register_fake("halfbyte::stack_downs_", lib=_library)
def _fake_downs(out: Tensor, downs: Sequence[Tensor]) -> None:
    return None


@torch.library.register_fake("halfbyte::stack_ups_", lib=_library)
def _fake_ups(out: Tensor, ups: Sequence[Tensor], starts: Sequence[int], scales: Sequence[float]) -> None:
    return None


@torch.library.register_fake("halfbyte::stack_weight_", lib=_library)
def _fake_stack(out: Tensor, *fields: Any) -> None:
    return None


def stackable(weight: PackedWeight) -> bool:
    """Whether `stack_weight` can take this weight: CUDA, or meta in its place, and rows of whole words."""
    if weight.packed.is_meta:
        return weight.shape[1] % _WORD == 0
    if torch.compiler.is_compiling():
        # Addresses are not to be had there; weights that were not cut out of another tensor lie right.
        return HAS_TRITON and weight.packed.is_cuda and weight.shape[1] % _WORD == 0
    return HAS_TRITON and stacked_triton.supports(weight)


def stack_weight(
    out: Tensor, weight: PackedWeight, up: Tensor | None, scale: float, first: int, columns: int
) -> None:
    """Fills out (N, K + columns), a view with any row stride: the weight (N, K), and up (N, rank) fp32 times scale in
    the columns from K + first, zeros in the rest of `columns`. Not differentiable."""
    if is_eager(out):
        stacked_triton.stack_weight(out, weight, up, scale, first, columns)
    else:
        torch.ops.halfbyte.stack_weight_.default(out, *weight, up, scale, first, columns)


def stack_downs(out: Tensor, downs: Sequence[Tensor]) -> None:
    """Fills out (extra, K) with A (rank, K) of several layers below each other, and with zeros behind them."""
    if HAS_TRITON and out.is_cuda and is_eager(out):
        _stack_downs_cuda(out, downs)
    else:
        torch.ops.halfbyte.stack_downs_.default(out, downs)


def stack_ups(out: Tensor, ups: Sequence[Tensor], starts: Sequence[int], scales: Sequence[float]) -> None:
    """Fills out (N, extra), contiguous, with B (N_i, rank) of several layers on a diagonal of blocks: each times its
    scale in fp32 before it is rounded, its rows from starts[i], its columns behind the layer's before; else zeros."""
    if HAS_TRITON and out.is_cuda and is_eager(out):
        _stack_ups_cuda(out, ups, starts, scales)
    else:
        torch.ops.halfbyte.stack_ups_.default(out, ups, starts, scales)
