"""Registers the blocks' tanh GELU with torch.

There are three ops: forward, backward, and backward with the neighboring adapters' gradients. All three can
write into a slice of a wider buffer.
"""

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import HAS_TRITON, is_eager
from halfbyte.kernels.fp32_product import product_in_fp32
from halfbyte.kernels.gelu import reference
from halfbyte.kernels.rows import WEIGHT_DTYPES

MOST_COLUMNS = 64
"""The most columns of `gb` or `xa` in the fused CUDA kernel: wider sums do not fit a program's registers."""

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
    from halfbyte.kernels.gelu import cuda, cuda_gradients

    _library.impl("gelu_tanh_", cuda.gelu_tanh, "CUDA")
    _library.impl("gelu_tanh_backward_", cuda.gelu_tanh_backward, "CUDA")
    _library.impl("gelu_tanh_gradients_", cuda_gradients.gelu_tanh_gradients, "CUDA")


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
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, expected (B, S, D) like x {tuple(x.shape)}"
        )


def _target(out: Tensor | None, x: Tensor) -> Tensor:
    if out is None:
        return x.new_empty(x.shape)
    _check("out", out, x)
    if out.stride(-1) != 1:
        raise ValueError(f"out: got strides {out.stride()}, expected contiguous rows (last stride 1)")
    return out


def gelu_tanh(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) of x (B, S, D), computed in fp32.

    Writes into `out` (B, S, D) if given: a slice of a wider buffer's rows, or x itself. Without `out` the
    result is new and contiguous, in x's dtype.

    Raises:
        ValueError: if a shape, dtype or stride does not fit.
    """
    _check("x", x, x)
    out = _target(out, x)
    if HAS_TRITON and x.is_cuda and is_eager(x):
        cuda.gelu_tanh(out, x)
    else:
        torch.ops.halfbyte.gelu_tanh_.default(out, x)
    return out


def gelu_tanh_backward(dy: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns the gradient of `gelu_tanh`'s x, from the output's gradient dy and x itself, all (B, S, D).

    dy may be a slice. Writes into `out` like `gelu_tanh`; `out` may be dy or x.

    Raises:
        ValueError: if a shape, dtype or stride does not fit.
    """
    _check("x", x, x)
    _check("dy", dy, x)
    out = _target(out, x)
    if HAS_TRITON and x.is_cuda and is_eager(x):
        cuda.gelu_tanh_backward(out, dy, x)
    else:
        torch.ops.halfbyte.gelu_tanh_backward_.default(out, dy, x)
    return out


def gelu_tanh_gradients(dy: Tensor, x: Tensor, gb: Tensor, xa: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Writes dx into `out`; returns the neighboring adapters' gradients gb^T gelu(x) (P, D), dx^T xa (D, U).

    An MLP is  x = W1 h + B1 (A1 h),  a = gelu(x),  z = W2 a + B2 (A2 a),  with adapters A, B in both layers:

    - `gb` = dL/dz B2 (M, P) comes from the layer that reads a. Then dL/dA2 = gb^T gelu(x).
    - `xa` = h A1^T (M, U) comes from the layer that writes x. Then dL/dB1 = dx^T xa.

    dy and x are (M, D); dy = dL/da. All inputs have one dtype, the returned gradients are fp32. gelu(x) and
    dx are rounded to the dtype before the products. `out` (M, D) may be dy or x.

    Raises:
        ValueError: if a shape, dtype or stride does not fit.
    """
    _check("x", x[None], x[None])
    _check("dy", dy[None], x[None])
    _target(out[None], x[None])
    for name, narrow in (("gb", gb), ("xa", xa)):
        if narrow.dim() != 2 or narrow.shape[0] != x.shape[0] or narrow.dtype != x.dtype:
            got = f"{narrow.dtype} {tuple(narrow.shape)}"
            raise ValueError(f"{name}: got {got}, expected {x.dtype} and {x.shape[0]} rows like x")
    # Too wide for the fused kernel: separate calls, with gelu(x) in memory. Meta tensors take the same path
    # as CUDA, because running a step on meta predicts the memory of a CUDA device.
    if (x.is_cuda or x.is_meta) and max(gb.shape[1], xa.shape[1]) > MOST_COLUMNS:
        acted = gelu_tanh(x[None])[0]
        gelu_tanh_backward(dy[None], x[None], out=out[None])
        return product_in_fp32(gb.t(), acted), product_in_fp32(out.t(), xa)
    if HAS_TRITON and x.is_cuda and is_eager(x):
        return cuda_gradients.gelu_tanh_gradients(out, dy, x, gb, xa)
    down, up = torch.ops.halfbyte.gelu_tanh_gradients_.default(out, dy, x, gb, xa)
    return down, up
