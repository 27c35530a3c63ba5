"""Triton kernels that cast and combine the adapters of a group of layers, in one launch per matrix.

The layers of a group share their input x. Their adapters combine into two matrices:

    downs: A_1, A_2, ... below each other                      (extra, K)
    ups:   scale_i * B_i as blocks along a diagonal, else 0    (N, extra)

so that one product with each gives all adapters' outputs. `extra` is at least the sum of the ranks.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.triton_launch import Launcher

MOST_LAYERS = 4

_TILE = 1024
_MOST_ROWS = 64
_VALUES = 4096  # of one program's tile; a larger one would spill from registers to memory


@triton.jit
def _down_kernel(
    out,
    first,
    second,
    third,
    fourth,
    WIDTH: tl.constexpr,
    OUT_ROW: tl.constexpr,
    END1: tl.constexpr,
    END2: tl.constexpr,
    END3: tl.constexpr,
    END4: tl.constexpr,
    TILE: tl.constexpr,
):
    """Stacks four matrices below each other in out, followed by zeros. Grid: (column tiles, rows of out).

    END1..END4 are the cumulative ranks. With fewer matrices the last END
    repeats, so no row selects a missing one.
    """
    row = tl.program_id(1)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = column < WIDTH
    value = tl.zeros((TILE,), tl.float32)
    if row < END1:
        value = tl.load(first + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    elif row < END2:
        value = tl.load(second + (row - END1) * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    elif row < END3:
        value = tl.load(third + (row - END2) * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    elif row < END4:
        value = tl.load(fourth + (row - END3) * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * OUT_ROW + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _part(
    up,
    row,
    column,
    scale,
    START: tl.constexpr,
    OUTPUTS: tl.constexpr,
    FIRST: tl.constexpr,
    RANK: tl.constexpr,
):
    """Returns a layer's scaled values within a tile, and 0 outside of its block at (START, FIRST)."""
    own = (row >= START) & (row < START + OUTPUTS) & (column >= FIRST) & (column < FIRST + RANK)
    return tl.load(up + (row - START) * RANK + column - FIRST, mask=own, other=0.0).to(tl.float32) * scale


@triton.jit
def _up_kernel(
    out,
    first,
    second,
    third,
    fourth,
    scale1,
    scale2,
    scale3,
    scale4,
    rows,
    COLUMNS: tl.constexpr,
    START1: tl.constexpr,
    START2: tl.constexpr,
    START3: tl.constexpr,
    START4: tl.constexpr,
    OUTPUTS1: tl.constexpr,
    OUTPUTS2: tl.constexpr,
    OUTPUTS3: tl.constexpr,
    OUTPUTS4: tl.constexpr,
    RANK1: tl.constexpr,
    RANK2: tl.constexpr,
    RANK3: tl.constexpr,
    RANK4: tl.constexpr,
    ROWS: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Fills contiguous out (rows, COLUMNS) with four scaled matrices as blocks on the diagonal, 0 elsewhere.

    Grid: (row tiles,). The scaling is fp32 and the result is rounded once to out's dtype.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, ROOM)[None, :]
    # The blocks have no element in common, so adding the tiles places each of them.
    value = _part(first, row, column, scale1, START1, OUTPUTS1, 0, RANK1)
    if RANK2 > 0:
        value += _part(second, row, column, scale2, START2, OUTPUTS2, RANK1, RANK2)
    if RANK3 > 0:
        value += _part(third, row, column, scale3, START3, OUTPUTS3, RANK1 + RANK2, RANK3)
    if RANK4 > 0:
        value += _part(fourth, row, column, scale4, START4, OUTPUTS4, RANK1 + RANK2 + RANK3, RANK4)
    mask = (row < rows) & (column < COLUMNS)
    tl.store(out + row * COLUMNS + column, value.to(out.dtype.element_ty), mask=mask)


_launch_down = Launcher(_down_kernel)
_launch_up = Launcher(_up_kernel)


def _four(parts: Sequence[Tensor]) -> list[Tensor]:
    """Returns contiguous tensors, padded with the last one to the number that the kernels take."""
    contiguous = [part.contiguous() for part in parts]
    return contiguous + contiguous[-1:] * (MOST_LAYERS - len(parts))


def stack_downs(out: Tensor, downs: Sequence[Tensor]) -> None:
    """Fills out (extra, K) with at most four A (rank, K) below each other, followed by zeros."""
    ends, end = [], 0
    for down in downs:
        end += down.shape[0]
        ends.append(end)
    ends += [end] * (MOST_LAYERS - len(ends))
    extra, width = out.shape
    grid = (triton.cdiv(width, _TILE), extra, 1)
    _launch_down(grid, (out, *_four(downs)), (width, out.stride(0), *ends, _TILE), num_warps=4)


def stack_ups(out: Tensor, ups: Sequence[Tensor], starts: Sequence[int], scales: Sequence[float]) -> None:
    """Fills out (N, extra), contiguous, with at most four B (N_i, rank) times their scales; zeros elsewhere.

    B_i starts at row starts[i]. Its columns follow those of B_(i-1).
    """
    missing = MOST_LAYERS - len(ups)
    rows, columns = out.shape
    room = triton.next_power_of_2(columns)
    at_once = max(1, min(_MOST_ROWS, _VALUES // room))
    _launch_up(
        (triton.cdiv(rows, at_once), 1, 1),
        (out, *_four(ups), *map(float, scales), *[1.0] * missing, rows),
        (
            columns,
            *(*starts, *[0] * missing),
            *(*(up.shape[0] for up in ups), *[0] * missing),
            *(*(up.shape[1] for up in ups), *[0] * missing),
            at_once,
            room,
        ),
        num_warps=4,
    )
