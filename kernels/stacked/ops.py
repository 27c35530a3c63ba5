"""Registers ops that stack 4-bit weights and adapters of several layers into one matrix.

A stacked matrix replaces several products by one. `stack_weight` has no reference implementation: where its
kernel cannot run, `halfbyte.quant.lora.linear_group` multiplies layer by layer instead. Meta tensors are
treated like CUDA tensors, because running a step on meta predicts the memory of a CUDA device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import HAS_TRITON, is_eager
from halfbyte.kernels.quantize_4bit.packed_weight import SCHEMA, PackedWeight

if HAS_TRITON:
    from halfbyte.kernels.stacked import cuda_adapters, cuda_weight

_WORD = 8  # 4-bit values in a 32-bit word

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define("stack_downs_(Tensor(a!) out, Tensor[] downs) -> ()")
_library.define("stack_ups_(Tensor(a!) out, Tensor[] ups, int[] starts, float[] scales) -> ()")
_library.define(
    f"stack_weight_(Tensor(a!) out, {SCHEMA}, Tensor? up, float scale, int first, int columns) -> ()"
)


def _stack_op(out: Tensor, *fields: Any) -> None:
    *weight, up, scale, first, columns = fields
    cuda_weight.stack_weight(out, PackedWeight.of(tuple(weight)), up, scale, first, columns)


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
    run = cuda_adapters.stack_downs if _is_few(downs) else _stack_downs
    run(out, downs)


def _stack_ups_cuda(
    out: Tensor, ups: Sequence[Tensor], starts: Sequence[int], scales: Sequence[float]
) -> None:
    run = cuda_adapters.stack_ups if _is_few(ups) else _stack_ups
    run(out, ups, starts, scales)


def _is_few(adapters: Sequence[Tensor]) -> bool:
    return 0 < len(adapters) <= cuda_adapters.MOST_LAYERS


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
    """Returns True if `stack_weight` can take this weight: on CUDA or meta, rows of whole 32-bit words."""
    if weight.packed.is_meta:
        return weight.shape[1] % _WORD == 0
    if torch.compiler.is_compiling():
        # A tensor has no address while compiling. Weights that are no slice of another tensor are aligned.
        return HAS_TRITON and weight.packed.is_cuda and weight.shape[1] % _WORD == 0
    return HAS_TRITON and cuda_weight.supports(weight)


def stack_weight(
    out: Tensor, weight: PackedWeight, up: Tensor | None, scale: float, first: int, columns: int
) -> None:
    """Fills out (N, K + columns), a view with any row stride, with the weight (N, K) and its scaled adapter.

    `up` (N, rank) fp32 times `scale` goes to the columns from K + first. The rest of the last `columns`
    becomes zero. Not differentiable; needs a weight for which `stackable` is True.
    """
    if is_eager(out):
        cuda_weight.stack_weight(out, weight, up, scale, first, columns)
    else:
        torch.ops.halfbyte.stack_weight_.default(out, *weight, up, scale, first, columns)


def stack_downs(out: Tensor, downs: Sequence[Tensor]) -> None:
    """Fills out (extra, K) with A (rank, K) of several layers below each other, followed by zeros."""
    if HAS_TRITON and out.is_cuda and is_eager(out):
        _stack_downs_cuda(out, downs)
    else:
        torch.ops.halfbyte.stack_downs_.default(out, downs)


def stack_ups(out: Tensor, ups: Sequence[Tensor], starts: Sequence[int], scales: Sequence[float]) -> None:
    """Fills contiguous out (N, extra) with several layers' B (N_i, rank) as blocks on the diagonal, else zeros.

    Each B_i is multiplied by its scale in fp32 and then rounded. It starts at row starts[i]; its columns
    follow those of the previous layer.
    """
    if HAS_TRITON and out.is_cuda and is_eager(out):
        _stack_ups_cuda(out, ups, starts, scales)
    else:
        torch.ops.halfbyte.stack_ups_.default(out, ups, starts, scales)
