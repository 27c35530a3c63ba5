"""Rows copied into a slice of a wider buffer, or out of one, as torch sees it."""

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import HAS_TRITON, is_eager

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define("copy_rows_(Tensor(a!) out, Tensor x) -> ()")


def _copy(out: Tensor, x: Tensor) -> None:
    out.copy_(x)


_library.impl("copy_rows_", _copy, "CompositeExplicitAutograd")

if HAS_TRITON:
    from halfbyte.kernels.copy_rows import cuda as copy_triton

    _library.impl("copy_rows_", copy_triton.copy_rows, "CUDA")


@torch.library.register_fake("halfbyte::copy_rows_", lib=_library)
def _fake_copy(out: Tensor, x: Tensor) -> None:
    return None


def copy_rows(x: Tensor, out: Tensor | None = None) -> Tensor:
    """x (B, S, D) into `out`, rows of any stride in both; without `out` into new contiguous memory. Returns it.

    Not differentiable. Raises ValueError for another shape or dtype of `out`, or rows of it that are not contiguous.
    """
    if x.dim() != 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, S, D)")
    if out is None:
        out = x.new_empty(x.shape)
    if out.shape != x.shape or out.dtype != x.dtype:
        got, expected = f"{out.dtype} {tuple(out.shape)}", f"{x.dtype} {tuple(x.shape)} as x"
        raise ValueError(f"out: got {got}, expected {expected}")
    if out.stride(-1) != 1:
        raise ValueError(f"out: got strides {out.stride()}, expected rows that are contiguous")
    if HAS_TRITON and x.is_cuda and is_eager(x):
        copy_triton.copy_rows(out, x)
    else:
        torch.ops.halfbyte.copy_rows_.default(out, x)
    return out
