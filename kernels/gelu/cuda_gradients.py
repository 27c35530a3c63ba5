"""The tanh GELU's backward on CUDA with the gradients of the adapters on either side of it, in one pass.

A block's MLP reads gelu(x) into one layer and writes x by another. The gradient of the first one's A needs gelu(x)
again, that of the second one's B the gradient of x; both are in registers here as the gradient of x is made, so that
neither gelu(x) nor a second reading of its gradient goes through memory. Sums over rows are made in two stages, the
same in every run: one sum a program, then the sum of those.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.gelu.cuda import gelu_gate, gelu_slope
from halfbyte.kernels.row_chunks import readable
from halfbyte.kernels.triton_launch import Launcher

_DEPTH = 32  # rows at a time
_TILE = 32  # columns of x that a program has
_SHARES = 8  # parts of the rows, each another program's
_SUM_TILE = 64
_LEAST = 16  # rows of a matrix unit's operand


@triton.jit
def _turned(source, row, inside, ROW: tl.constexpr, COLUMNS: tl.constexpr, ROOM: tl.constexpr):
    """Rows of a narrow matrix as columns: (ROOM, rows), 0 beyond what there is."""
    column = tl.arange(0, ROOM)
    place = source + row[None, :] * ROW + column[:, None]
    return tl.load(place, mask=(column < COLUMNS)[:, None] & inside[None, :], other=0.0)


@triton.jit
def _gradients_kernel(
    out,
    dy,
    x,
    gb,
    xa,
    sums,
    rows,
    OUT_ROW: tl.constexpr,
    DY_ROW: tl.constexpr,
    X_ROW: tl.constexpr,
    GB_ROW: tl.constexpr,
    XA_ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    GB: tl.constexpr,
    XA: tl.constexpr,
    GB_ROOM: tl.constexpr,
    XA_ROOM: tl.constexpr,
    DEPTH: tl.constexpr,
    TILE: tl.constexpr,
):
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    within = column < WIDTH
    share = tl.cdiv(tl.cdiv(rows, DEPTH), tl.num_programs(1)) * DEPTH
    first = tl.program_id(1) * share
    down = tl.zeros((GB_ROOM, TILE), tl.float32)
    up = tl.zeros((XA_ROOM, TILE), tl.float32)
    for start in range(first, min(first + share, rows), DEPTH):
        row = (start + tl.arange(0, DEPTH)).to(tl.int64)
        inside = row < rows
        mask = inside[:, None] & within[None, :]
        value = tl.load(x + row[:, None] * X_ROW + column[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + row[:, None] * DY_ROW + column[None, :], mask=mask, other=0.0).to(tl.float32)
        gate, closed = gelu_gate(value)
        result = (grad * gelu_slope(value, gate, closed)).to(out.dtype.element_ty)
        tl.store(out + row[:, None] * OUT_ROW + column[None, :], result, mask=mask)
        if GB > 0:
            narrow = _turned(gb, row, inside, GB_ROW, GB, GB_ROOM)
            acted = (value * gate).to(narrow.dtype)
            down = tl.dot(narrow, acted, down, input_precision="ieee")
        if XA > 0:
            narrow = _turned(xa, row, inside, XA_ROW, XA, XA_ROOM)
            up = tl.dot(narrow, result.to(narrow.dtype), up, input_precision="ieee")
    place = sums + tl.program_id(1).to(tl.int64) * (GB + XA) * WIDTH + column[None, :]
    if GB > 0:
        number = tl.arange(0, GB_ROOM)[:, None]
        tl.store(place + number * WIDTH, down, mask=(number < GB) & within[None, :])
    if XA > 0:
        number = tl.arange(0, XA_ROOM)[:, None]
        tl.store(place + (GB + number) * WIDTH, up, mask=(number < XA) & within[None, :])


@triton.jit
def _sum_kernel(
    sums,
    down,
    up,
    shares,
    WIDTH: tl.constexpr,
    GB: tl.constexpr,
    XA: tl.constexpr,
    GB_ROOM: tl.constexpr,
    XA_ROOM: tl.constexpr,
    TILE: tl.constexpr,
):
    """down (GB, D) and up (D, XA) of sums (shares, GB + XA, D)."""
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)[None, :]
    within = column < WIDTH
    if GB > 0:
        number = tl.arange(0, GB_ROOM)[:, None]
        mask = (number < GB) & within
        total = tl.zeros((GB_ROOM, TILE), tl.float32)
        for share in range(shares):
            place = sums + (share * (GB + XA) + number) * WIDTH + column
            total += tl.load(place, mask=mask, other=0.0)
        tl.store(down + number * WIDTH + column, total, mask=mask)
    if XA > 0:
        number = tl.arange(0, XA_ROOM)[:, None]
        mask = (number < XA) & within
        total = tl.zeros((XA_ROOM, TILE), tl.float32)
        for share in range(shares):
            place = sums + (share * (GB + XA) + GB + number) * WIDTH + column
            total += tl.load(place, mask=mask, other=0.0)
        tl.store(up + column * XA + number, total, mask=mask)


_launch_gradients = Launcher(_gradients_kernel)
_launch_sum = Launcher(_sum_kernel)


def _room(columns: int) -> int:
    return max(_LEAST, triton.next_power_of_2(columns))


def gelu_tanh_gradients(out: Tensor, dy: Tensor, x: Tensor, gb: Tensor, xa: Tensor) -> tuple[Tensor, Tensor]:
    """`elementwise_reference.gelu_tanh_gradients`, of few columns in `gb` and in `xa`."""
    dy, x, gb, xa = readable(dy), readable(x), readable(gb), readable(xa)
    (rows, width), p, u = x.shape, gb.shape[1], xa.shape[1]
    down = torch.empty((p, width), dtype=torch.float32, device=x.device)
    up = torch.empty((width, u), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return down.zero_(), up.zero_()
    shares = min(_SHARES, triton.cdiv(rows, _DEPTH))
    sums = torch.empty((shares, p + u, width), dtype=torch.float32, device=x.device)
    sizes = (width, p, u, _room(p), _room(u))
    _launch_gradients(
        (triton.cdiv(width, _TILE), shares, 1),
        (out, dy, x, gb, xa, sums, rows),
        (
            out.stride(0),
            dy.stride(0),
            x.stride(0),
            gb.stride(0),
            xa.stride(0),
            *sizes,
            _DEPTH,
            _TILE,
        ),
        num_warps=4,
        num_stages=3,
    )
    _launch_sum(
        (triton.cdiv(width, _SUM_TILE), 1, 1), (sums, down, up, shares), (*sizes, _SUM_TILE), num_warps=4
    )
    return down, up
