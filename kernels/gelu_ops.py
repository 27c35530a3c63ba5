"""The blocks' tanh GELU, forward and backward, as torch sees it: into a slice of a wider buffer where one is given."""

import importlib.util

import torch
from torch import Tensor

from halfbyte.kernels import elementwise_reference as reference
from halfbyte.kernels.tracing import is_eager

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define("gelu_tanh_(Tensor(a!) out, Tensor x) -> ()")
_library.define("gelu_tanh_backward_(Tensor(a!) out, Tensor dy, Tensor x) -> ()")


def _gelu(out: Tensor, x: Tensor) -> None:
    out.copy_(reference.gelu_tanh(x))


def _gelu_backward(out: Tensor, dy: Tensor, x: Tensor) -> None:
    out.copy_(reference.gelu_tanh_backward(dy, x))


_library.impl("gelu_tanh_", _gelu, "CompositeExplicitAutograd")
_library.impl("gelu_tanh_backward_", _gelu_backward, "CompositeExplicitAutograd")

# torch's CUDA builds bring Triton; its CPU builds have none, and no use for it.
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from halfbyte.kernels import gelu_triton

    _library.impl("gelu_tanh_", gelu_triton.gelu_tanh, "CUDA")
    _library.impl("gelu_tanh_backward_", gelu_triton.gelu_tanh_backward, "CUDA")


@torch.library.register_fake("halfbyte::gelu_tanh_", lib=_library)
def _fake_gelu(out: Tensor, x: Tensor) -> None:
    return None


@torch.library.register_fake("halfbyte::gelu_tanh_backward_", lib=_library)
def _fake_gelu_backward(out: Tensor, dy: Tensor, x: Tensor) -> None:
    return None


def _check(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: got {tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}")
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
