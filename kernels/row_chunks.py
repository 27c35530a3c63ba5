"""What the CUDA kernels over a stream's rows share: a row in chunks that stay in registers, and sums over rows.

A program takes one row: at FLUX's shapes that is faster than several one after the other, for which modulation would
be loaded once. Only a sum over rows has few programs with many rows each. It is made in two stages, the same in every
run: one sum a program, then the sum of those.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.triton_launch import Launcher

_LANE_VALUES = 8  # 16 bytes of a 16-bit type: what a lane loads at once
_CHUNKS = (256, 512, 1024, 2048, 4096)
_MOST_CHUNKS = 4  # of more, a lane's registers leave too few programs on a multiprocessor
_MOST_SUMS = 264  # programs that leave a sum each: two on each of an H200's 132 multiprocessors


class RowTile(NamedTuple):
    """A row as a program holds it: `chunks` of `chunk` values, by so many warps."""

    chunk: int
    chunks: int
    warps: int


@triton.jit
def load_chunk(row, number: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Values of a chunk in fp32, 0 beyond the row's width."""
    column = number * CHUNK + tl.arange(0, CHUNK)
    if (number + 1) * CHUNK <= WIDTH:
        return tl.load(row + column).to(tl.float32)
    return tl.load(row + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def store_chunk(row, value, number: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """The chunk into its row, in the row's dtype."""
    column = number * CHUNK + tl.arange(0, CHUNK)
    if (number + 1) * CHUNK <= WIDTH:
        tl.store(row + column, value.to(row.dtype.element_ty))
    else:
        tl.store(row + column, value.to(row.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def row_statistics(values, eps, WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Mean and 1 / standard deviation of a row in chunks."""
    total = tl.zeros((CHUNK,), tl.float32)
    for number in tl.static_range(CHUNKS):
        total += values[number]
    mean = tl.sum(total, axis=0) / WIDTH
    squares = tl.zeros((CHUNK,), tl.float32)
    for number in tl.static_range(CHUNKS):
        centred = values[number] - mean
        if (number + 1) * CHUNK > WIDTH:
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
    """out (B, D) of sums (B, count, D)."""
    batch = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    total = tl.zeros((DEPTH, TILE), tl.float32)
    for start in range(0, count, DEPTH):
        place = start + tl.arange(0, DEPTH)
        inside = (place < count)[:, None] & (column < WIDTH)[None, :]
        source = sums + (batch * count + place)[:, None] * WIDTH + column[None, :]
        total += tl.load(source, mask=inside, other=0.0)
    value = tl.sum(total, axis=0)
    tl.store(out + batch * WIDTH + column, value.to(out.dtype.element_ty), mask=column < WIDTH)


_launch_sum = Launcher(_sum_kernel)


def row_tile(width: int) -> RowTile:
    """The tile for rows of `width`: the least padding, then the fewest chunks.

    Raises ValueError where no program's registers hold a row.
    """
    fitting = [(chunk, triton.cdiv(width, chunk)) for chunk in _CHUNKS if width <= chunk * _MOST_CHUNKS]
    if not fitting:
        most = _CHUNKS[-1] * _MOST_CHUNKS
        raise ValueError(f"x: got rows of {width}, expected at most {most}, which a program's registers hold")
    chunk, chunks = min(fitting, key=lambda choice: (choice[0] * choice[1], choice[1]))
    return RowTile(chunk, chunks, chunk // (32 * _LANE_VALUES))


def readable(tensor: Tensor) -> Tensor:
    """The tensor, its last dimension contiguous: a slice as it lies, anything else copied."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def target(out: Tensor | None, like: Tensor) -> Tensor:
    """`out`, whose rows are contiguous, or new memory for a stream (B, S, D)."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device) if out is None else out


def partial_sums(stream: Tensor) -> Tensor:
    """Room for a sum (D,) fp32 of each program over the rows of a stream (B, S, D): (B, programs, D)."""
    batch, rows, width = stream.shape
    return torch.empty((batch, min(rows, _MOST_SUMS), width), dtype=torch.float32, device=stream.device)


def add_up(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums (B, programs, D) over the programs: (B, D) in `dtype`."""
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
