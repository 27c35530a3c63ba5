"""4-bit weights dequantized into a wider matrix, as torch sees it: schema, fake, and which weights can be.

There is no reference to dispatch to: where the kernel cannot run, products are made layer by layer instead, see
`halfbyte.quant.linear_group`. Tensors on meta stand for those of a CUDA device, whose memory is planned by running a
step without values.
"""

from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.linear_ops import HAS_TRITON
from halfbyte.kernels.packed_weight import SCHEMA, PackedWeight
from halfbyte.kernels.tracing import is_eager

if HAS_TRITON:
    from halfbyte.kernels import stacked_triton

_WORD = 8  # 4-bit values

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define(
    f"stack_weight_(Tensor(a!) out, {SCHEMA}, Tensor? up, float scale, int first, int columns) -> ()"
)


def _stack_op(out: Tensor, *fields: Any) -> None:
    *weight, up, scale, first, columns = fields
    stacked_triton.stack_weight(out, PackedWeight.of(tuple(weight)), up, scale, first, columns)


_library.impl("stack_weight_", _stack_op, "CUDA")


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
