"""Building blocks for Triton kernels that process a stream (B, S, D) row by row.

A program keeps a whole row of D values in registers, split into chunks. Normally one
program handles one row. At FLUX's shapes this is faster than looping over several rows,
even though a loop would load the modulation only once.

Only a sum over rows uses few programs with many rows each. It runs in two stages so
that the order of additions is the same in every run: each program stores its partial
sum, then a second kernel adds the partial sums.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.triton_launch import Launcher

_LANE_VALUES = 8  # 16 bytes of a 16-bit dtype: one vectorized load of a lane
_CHUNKS = (256, 512, 1024, 2048, 4096)
_MOST_CHUNKS = 4  # with more, register pressure leaves too few programs on a multiprocessor
_MOST_SUMS = 264  # programs that write partial sums: two for each of an H200's 132 multiprocessors


class RowTile(NamedTuple):
    """The layout of a row in a program's registers: `chunks` chunks of `chunk` values, in `warps` warps."""

    chunk: int
    chunks: int
    warps: int


@triton.jit
def load_chunk(row, number: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Loads chunk `number` of a row as fp32 (CHUNK,); positions past the row's width are 0."""
    column = number * CHUNK + tl.arange(0, CHUNK)
    # `number` is a compile-time constant: only the last chunk of a ragged row needs a mask.
    if (number + 1) * CHUNK <= WIDTH:
        return tl.load(row + column).to(tl.float32)
    return tl.load(row + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def store_chunk(row, value, number: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Stores chunk `number` into its row, converted to the row's dtype."""
    column = number * CHUNK + tl.arange(0, CHUNK)
    if (number + 1) * CHUNK <= WIDTH:
        tl.store(row + column, value.to(row.dtype.element_ty))
    else:
        tl.store(row + column, value.to(row.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def row_statistics(values, eps, WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Returns the mean and 1 / sqrt(variance + eps) of a row, as fp32 scalars.

    The variance is the mean of (x - mean)^2 in a second loop. E[x^2] - mean^2
    would cancel for rows with a large mean.
    """
    # Add the chunks elementwise first, so that the reduction across lanes happens only once.
    total = tl.zeros((CHUNK,), tl.float32)
    for number in tl.static_range(CHUNKS):
        total += values[number]
    mean = tl.sum(total, axis=0) / WIDTH
    squares = tl.zeros((CHUNK,), tl.float32)
    for number in tl.static_range(CHUNKS):
        centred = values[number] - mean
        if (number + 1) * CHUNK > WIDTH:
            # Padding was loaded as 0 and is now -mean: it must not count.
            centred = tl.where(number * CHUNK + tl.arange(0, CHUNK) < WIDTH, centred, 0.0)
        squares += centred * centred
    return mean, tl.rsqrt(tl.sum(squares, axis=0) / WIDTH + eps)


@triton.jit
def _sum_kernel(
    sums,
    out,
    count,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Adds partial sums (B, count, D) fp32 over `count` into out (B, D). Grid: (column tiles, B)."""
    batch = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    total = tl.zeros((DEPTH, TILE), tl.float32)
    for start in range(0, count, DEPTH):
        place = start + tl.arange(0, DEPTH)  # DEPTH partial sums at a time, TILE columns each
        inside = (place < count)[:, None] & (column < WIDTH)[None, :]
        source = sums + (batch * count + place)[:, None] * WIDTH + column[None, :]
        total += tl.load(source, mask=inside, other=0.0)
    value = tl.sum(total, axis=0)
    tl.store(out + batch * WIDTH + column, value.to(out.dtype.element_ty), mask=column < WIDTH)


_launch_sum = Launcher(_sum_kernel)


def row_tile(width: int) -> RowTile:
    """Returns the tile for rows of `width` values with the least padding, and then the fewest chunks.

    Raises:
        ValueError: if a row is too wide for the registers of one program.
    """
    fitting = [(chunk, triton.cdiv(width, chunk)) for chunk in _CHUNKS if width <= chunk * _MOST_CHUNKS]
    if not fitting:
        most = _CHUNKS[-1] * _MOST_CHUNKS
        raise ValueError(
            f"x: got rows of {width} values, expected at most {most} (the registers of one program)"
        )
    chunk, chunks = min(fitting, key=lambda choice: (choice[0] * choice[1], choice[1]))
    return RowTile(chunk, chunks, chunk // (32 * _LANE_VALUES))


def readable(tensor: Tensor) -> Tensor:
    """Returns the tensor unchanged if its last dimension is contiguous, otherwise a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def target(out: Tensor | None, like: Tensor) -> Tensor:
    """Returns `out` if given (its rows must be contiguous), else a new tensor like the stream (B, S, D)."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device) if out is None else out


def partial_sums(stream: Tensor) -> Tensor:
    """Allocates (B, programs, D) fp32: one partial sum over rows for each program of a stream (B, S, D).

    Its second dimension is also the number of programs the kernel must be launched with.
    """
    batch, rows, width = stream.shape
    return torch.empty((batch, min(rows, _MOST_SUMS), width), dtype=torch.float32, device=stream.device)


def add_up(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Adds the partial sums (B, programs, D) over the programs in fp32 and rounds to (B, D) in `dtype`."""
    batch, count, width = sums.shape
    out = torch.empty((batch, width), dtype=dtype, device=sums.device)
    if out.numel():
        _launch_sum(
            (triton.cdiv(width, 32), batch, 1),
            (sums, out, count),
            (width, 64, 32),
            num_warps=4,
        )
    return out
