"""Registers an op that copies rows into or out of a slice of a wider buffer."""

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import HAS_TRITON, is_eager

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define("copy_rows_(Tensor(a!) out, Tensor x) -> ()")


def _copy(out: Tensor, x: Tensor) -> None:
    out.copy_(x)


_library.impl("copy_rows_", _copy, "CompositeExplicitAutograd")

if HAS_TRITON:
    from halfbyte.kernels.copy_rows import cuda

    _library.impl("copy_rows_", cuda.copy_rows, "CUDA")


@torch.library.register_fake("halfbyte::copy_rows_", lib=_library)
def _fake_copy(out: Tensor, x: Tensor) -> None:
    return None


def copy_rows(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Copies x (B, S, D) into `out`, or into new contiguous memory, and returns the copy. Not differentiable.

    Both may have any row stride.

    Raises:
        ValueError: if `out` differs from x in shape or dtype, or its rows are not contiguous.
    """
    if x.dim() != 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, S, D)")
    if out is None:
        out = x.new_empty(x.shape)
    if out.shape != x.shape or out.dtype != x.dtype:
        got, expected = f"{out.dtype} {tuple(out.shape)}", f"{x.dtype} {tuple(x.shape)} like x"
        raise ValueError(f"out: got {got}, expected {expected}")
    if out.stride(-1) != 1:
        raise ValueError(f"out: got strides {out.stride()}, expected contiguous rows (last stride 1)")
    if HAS_TRITON and x.is_cuda and is_eager(x):
        cuda.copy_rows(out, x)
    else:
        torch.ops.halfbyte.copy_rows_.default(out, x)
    return out
