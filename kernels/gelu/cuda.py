"""Triton kernels for the tanh GELU, forward and backward, with any row stride in inputs and output."""

import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.row_chunks import readable
from halfbyte.kernels.triton_launch import Launcher

_TILE = 1024
_WARPS = 4
_SCALE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
_CUBIC = tl.constexpr(0.044715)
_LARGEST = tl.constexpr(1e38)


@triton.jit
def gelu_gate(value):
    """Returns (sigmoid(2u), sigmoid(-2u)) = (gelu(value) / value, 1 minus that), from a single exponential.

    With e = exp(-2u):  sigmoid(2u) = 1 / (1 + e)  and  sigmoid(-2u) = e / (1 + e).  Neither cancels.
    """
    decay = tl.exp(-2 * _SCALE * value * (1 + _CUBIC * value * value))
    gate = 1 / (1 + decay)
    # For very negative values e is infinite and the gate 0: clamp e, because infinity * 0 would be NaN.
    return gate, tl.minimum(decay, _LARGEST) * gate


@triton.jit
def gelu_slope(value, gate, complement):
    """Returns gelu'(value) = s + x s (1 - s) 2 u', with s and 1 - s from `gelu_gate`."""
    return gate + value * gate * complement * (2 * _SCALE * (1 + 3 * _CUBIC * value * value))


@triton.jit
def _gelu_kernel(
    out,
    dy,
    x,
    out_batch,
    dy_batch,
    x_batch,
    OUT_ROW: tl.constexpr,
    DY_ROW: tl.constexpr,
    X_ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Computes out = gelu(x), or with BACKWARD out = dy * gelu'(x). Grid: (rows * column tiles, B).

    A program handles TILE columns of one row. It reads its inputs before it writes, so
    out may be x or dy. Row strides are constants, so that Triton sees the alignment of
    the rows; batch strides are run-time numbers.
    """
    tiles: tl.constexpr = (WIDTH + TILE - 1) // TILE
    batch = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    inside = column < WIDTH
    value = tl.load(x + batch * x_batch + row * X_ROW + column, mask=inside, other=0.0).to(tl.float32)
    gate, complement = gelu_gate(value)
    if BACKWARD:
        grad = tl.load(dy + batch * dy_batch + row * DY_ROW + column, mask=inside, other=0.0).to(tl.float32)
        result = grad * gelu_slope(value, gate, complement)
    else:
        result = value * gate
    place = out + batch * out_batch + row * OUT_ROW + column
    tl.store(place, result.to(out.dtype.element_ty), mask=inside)


_launch_gelu = Launcher(_gelu_kernel)


def _run(out: Tensor, dy: Tensor, x: Tensor, backward: bool) -> None:
    batch, rows, width = x.shape
    if x.numel() == 0:
        return
    _launch_gelu(
        (rows * triton.cdiv(width, _TILE), batch, 1),
        (out, dy, x, out.stride(0), dy.stride(0), x.stride(0)),
        (out.stride(1), dy.stride(1), x.stride(1), width, _TILE, backward),
        num_warps=_WARPS,
    )


def gelu_tanh(out: Tensor, x: Tensor) -> None:
    """Writes `halfbyte.kernels.gelu.reference.gelu_tanh` into `out`, with contiguous rows."""
    x = readable(x)
    _run(out, x, x, backward=False)


def gelu_tanh_backward(out: Tensor, dy: Tensor, x: Tensor) -> None:
    """Writes `halfbyte.kernels.gelu.reference.gelu_tanh_backward` into `out`, with contiguous rows."""
    _run(out, readable(dy), readable(x), backward=True)
