"""Triton kernel for the tanh GELU's backward, fused with the gradients of the two neighboring adapters.

In an MLP one layer writes x and the next layer reads a = gelu(x). Three results are needed (see
`halfbyte.kernels.gelu.ops.gelu_tanh_gradients`):

    dx   = dy * gelu'(x)       (M, D)  in the streams' dtype
    down = gb^T gelu(x)        (P, D)  fp32, gradient of the reading layer's A
    up   = (dx^T xa)           (D, U)  fp32, gradient of the writing layer's B

While dx is computed, both gelu(x) and dx are in registers. Multiplying them there means that gelu(x) is never
written to memory and dx is not read again.

The products sum over the M rows. To add in the same order in every run, there are two stages and no atomics:
each program writes the sum over its share of the rows, then a second kernel adds the shares.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.gelu.cuda import gelu_gate, gelu_slope
from halfbyte.kernels.row_chunks import readable
from halfbyte.kernels.triton_launch import Launcher

_DEPTH = 32  # rows per loop iteration
_TILE = 32  # columns of x per program
_SHARES = 8  # programs that split the rows of a column tile
_SUM_TILE = 64  # columns per program of the second stage
_LEAST = 16  # the smallest side of a `tl.dot` operand


@triton.jit
def _load_transposed(source, row, inside, ROW: tl.constexpr, COLUMNS: tl.constexpr, ROOM: tl.constexpr):
    """Loads rows of a narrow matrix (M, COLUMNS) transposed, as (ROOM, rows), padded with 0."""
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
    """Writes dx into `out` and partial sums (shares, GB + XA, WIDTH) fp32. Grid: (column tiles, shares).

    GB and XA are P and U, the true columns of gb and xa (0: there is no such adapter). GB_ROOM and XA_ROOM
    are padded to a size that `tl.dot` takes.
    """
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    within = column < WIDTH
    # The rows of this program's share, a multiple of DEPTH so that iterations do not overlap between shares.
    share = tl.cdiv(tl.cdiv(rows, DEPTH), tl.num_programs(1)) * DEPTH
    first = tl.program_id(1) * share
    # fp32 accumulators, in registers for the whole loop. `up` holds (xa^T dx) = (dx^T xa)^T, so that both
    # have columns of x along their second dimension.
    down = tl.zeros((GB_ROOM, TILE), tl.float32)
    up = tl.zeros((XA_ROOM, TILE), tl.float32)
    for start in range(first, min(first + share, rows), DEPTH):
        row = (start + tl.arange(0, DEPTH)).to(tl.int64)
        inside = row < rows
        mask = inside[:, None] & within[None, :]
        value = tl.load(x + row[:, None] * X_ROW + column[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + row[:, None] * DY_ROW + column[None, :], mask=mask, other=0.0).to(tl.float32)
        gate, complement = gelu_gate(value)
        # dx is rounded before the product below, as the reference rounds it. Rows and columns outside the
        # matrices have value = grad = 0 and add nothing to the sums.
        result = (grad * gelu_slope(value, gate, complement)).to(out.dtype.element_ty)
        # out may be x or dy: this program has already read the elements that it
        # overwrites, and no other reads them.
        tl.store(out + row[:, None] * OUT_ROW + column[None, :], result, mask=mask)
        if GB > 0:
            narrow = _load_transposed(gb, row, inside, GB_ROW, GB, GB_ROOM)  # gb^T (GB_ROOM, DEPTH)
            acted = (value * gate).to(narrow.dtype)  # gelu(x) (DEPTH, TILE), rounded
            # "ieee": fp32 inputs are multiplied in fp32, not in TF32. It does not affect 16-bit inputs.
            down = tl.dot(narrow, acted, down, input_precision="ieee")
        if XA > 0:
            narrow = _load_transposed(xa, row, inside, XA_ROW, XA, XA_ROOM)  # xa^T (XA_ROOM, DEPTH)
            up = tl.dot(narrow, result.to(narrow.dtype), up, input_precision="ieee")
    # Of a share's GB + XA rows in `sums`, the first GB belong to `down` and the rest to `up`.
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
    """Adds sums (shares, GB + XA, D) over the shares into down (GB, D) and, transposed, up (D, XA).

    Grid: (column tiles,). The loop over shares fixes the order of additions.
    """
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
    """Computes `halfbyte.kernels.gelu.reference.gelu_tanh_gradients` in two launches.

    Writes dx into `out`, whose rows must be contiguous, and returns (down (P, D), up (D, U)) in fp32.
    gb and xa must have at most `halfbyte.kernels.gelu.ops.MOST_COLUMNS` columns.
    """
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
