"""The blocks' tanh GELU, forward and backward, as torch sees it: into a slice of a wider buffer where one is given.

The backward comes with the gradients of the adapters on either side of it as well.
"""

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import HAS_TRITON, is_eager
from halfbyte.kernels.fp32_product import product_in_fp32
from halfbyte.kernels.gelu import reference
from halfbyte.kernels.rows import WEIGHT_DTYPES

MOST_COLUMNS = 64
"""Of either narrow matrix in one pass on CUDA: the sums of more do not fit into a program's registers."""

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define("gelu_tanh_(Tensor(a!) out, Tensor x) -> ()")
_library.define("gelu_tanh_backward_(Tensor(a!) out, Tensor dy, Tensor x) -> ()")
_library.define(
    "gelu_tanh_gradients_(Tensor(a!) out, Tensor dy, Tensor x, Tensor gb, Tensor xa) -> (Tensor, Tensor)"
)


def _gelu(out: Tensor, x: Tensor) -> None:
    out.copy_(reference.gelu_tanh(x))


def _gelu_backward(out: Tensor, dy: Tensor, x: Tensor) -> None:
    out.copy_(reference.gelu_tanh_backward(dy, x))


def _gelu_gradients(out: Tensor, dy: Tensor, x: Tensor, gb: Tensor, xa: Tensor) -> tuple[Tensor, Tensor]:
    dx, down, up = reference.gelu_tanh_gradients(dy, x, gb, xa)
    out.copy_(dx)
    return down, up


_library.impl("gelu_tanh_", _gelu, "CompositeExplicitAutograd")
_library.impl("gelu_tanh_backward_", _gelu_backward, "CompositeExplicitAutograd")
_library.impl("gelu_tanh_gradients_", _gelu_gradients, "CompositeExplicitAutograd")

if HAS_TRITON:
    from halfbyte.kernels.gelu import cuda as gelu_triton
    from halfbyte.kernels.gelu import cuda_gradients as gelu_gradients_triton

    _library.impl("gelu_tanh_", gelu_triton.gelu_tanh, "CUDA")
    _library.impl("gelu_tanh_backward_", gelu_triton.gelu_tanh_backward, "CUDA")
    _library.impl("gelu_tanh_gradients_", gelu_gradients_triton.gelu_tanh_gradients, "CUDA")


@torch.library.register_fake("halfbyte::gelu_tanh_", lib=_library)
def _fake_gelu(out: Tensor, x: Tensor) -> None:
    return None


@torch.library.register_fake("halfbyte::gelu_tanh_backward_", lib=_library)
def _fake_gelu_backward(out: Tensor, dy: Tensor, x: Tensor) -> None:
    return None


@torch.library.register_fake("halfbyte::gelu_tanh_gradients_", lib=_library)
def _fake_gelu_gradients(out: Tensor, dy: Tensor, x: Tensor, gb: Tensor, xa: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    width = x.shape[1]
    return (
        x.new_empty((gb.shape[1], width), dtype=dtype),
        x.new_empty((width, xa.shape[1]), dtype=dtype),
    )


def _check(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name}: got {tensor.dtype}, expected one of {', '.join(map(str, WEIGHT_DTYPES))}")
    if tensor.dim() != 3 or tensor.shape != x.shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected (B, S, D) as x {tuple(x.shape)}")


def _target(out: Tensor | None, x: Tensor) -> Tensor:
    if out is None:
        return x.new_empty(x.shape)
    _check("out", out, x)
    if out.stride(-1) != 1:
        raise ValueError(f"out: got strides {out.stride()}, expected rows that are contiguous")
    return out


def gelu_tanh(x: Tensor, out: Tensor | None = None) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) of x (B, S, D), in fp32 within.

    Written into `out` (B, S, D) where given, which may be a slice of a wider buffer's rows and x itself, and
    returned; otherwise new and contiguous in x's dtype.
    """
    _check("x", x, x)
    out = _target(out, x)
    if HAS_TRITON and x.is_cuda and is_eager(x):
        gelu_triton.gelu_tanh(out, x)
    else:
        torch.ops.halfbyte.gelu_tanh_.default(out, x)
    return out


def gelu_tanh_backward(dy: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradient of `gelu_tanh`'s x, from x itself: dy (B, S, D), which may be a slice, and x (B, S, D).

    Written into `out` as in `gelu_tanh`; `out` may be dy or x.
    """
    _check("x", x, x)
    _check("dy", dy, x)
    out = _target(out, x)
    if HAS_TRITON and x.is_cuda and is_eager(x):
        gelu_triton.gelu_tanh_backward(out, dy, x)
    else:
        torch.ops.halfbyte.gelu_tanh_backward_.default(out, dy, x)
    return out


def gelu_tanh_gradients(dy: Tensor, x: Tensor, gb: Tensor, xa: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """`gelu_tanh_backward` of matrices, and of the same pass gb^T gelu(x) (P, D) and dx^T xa (D, U) in fp32.

    dy and x (M, D), gb (M, P) and xa (M, U) of one dtype; dx goes into `out` (M, D), which may be dy or x.
    With p = dL/dy B of the layer that reads gelu(x), the first is the gradient of its A; with u = x A^T of the layer
    that writes x, the second is that of its B. gelu(x) and dx are rounded to their dtype before they are multiplied.
    """
    _check("x", x[None], x[None])
    _check("dy", dy[None], x[None])
    _target(out[None], x[None])
    for name, narrow in (("gb", gb), ("xa", xa)):
        if narrow.dim() != 2 or narrow.shape[0] != x.shape[0] or narrow.dtype != x.dtype:
            got = f"{narrow.dtype} {tuple(narrow.shape)}"
            raise ValueError(f"{name}: got {got}, expected {x.dtype} and the {x.shape[0]} rows of x")
    # On meta as on CUDA, whose memory is planned there.
    if (x.is_cuda or x.is_meta) and max(gb.shape[1], xa.shape[1]) > MOST_COLUMNS:
        acted = gelu_tanh(x[None])[0]
        gelu_tanh_backward(dy[None], x[None], out=out[None])
        return product_in_fp32(gb.t(), acted), product_in_fp32(out.t(), xa)
    if HAS_TRITON and x.is_cuda and is_eager(x):
        return gelu_gradients_triton.gelu_tanh_gradients(out, dy, x, gb, xa)
    down, up = torch.ops.halfbyte.gelu_tanh_gradients_.default(out, dy, x, gb, xa)
    return down, up
