"""Triton kernel for the backward of the gated residual: dupdate and, if modulation is trained, dgate."""

# Triton joins tuples with + and has no unpacking; to a type checker a tuple's length is part of its type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.row_chunks import (
    add_up,
    load_chunk,
    partial_sums,
    readable,
    row_tile,
    store_chunk,
    target,
)
from halfbyte.kernels.triton_launch import Launcher


@triton.jit
def _kernel(
    dy,
    gate,
    update,
    dupdate,
    gate_sums,
    rows,
    dy_batch,
    update_batch,
    gate_batch,
    dupdate_batch,
    DY_ROW: tl.constexpr,
    UPDATE_ROW: tl.constexpr,
    DUPDATE_ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    SUMS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Computes dupdate = gate * dy, and with SUMS each program's partial sum of dgate.

    dgate is the sum over rows of dy * update.
    Grid: (rows, B), or with SUMS (programs, B) where each program loops over rows.
    """
    first = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    gates = ()
    dgates = ()  # fp32 accumulators over this program's rows
    for chunk in tl.static_range(CHUNKS):
        gates = gates + (load_chunk(gate + batch * gate_batch, chunk, WIDTH, CHUNK),)
        if SUMS:
            dgates = dgates + (tl.zeros((CHUNK,), tl.float32),)
    for row in range(first, rows, tl.num_programs(0)):
        new_dgates = ()  # Triton cannot assign to an element of a tuple
        for chunk in tl.static_range(CHUNKS):
            grad = load_chunk(dy + batch * dy_batch + row * DY_ROW, chunk, WIDTH, CHUNK)
            place = dupdate + batch * dupdate_batch + row * DUPDATE_ROW
            store_chunk(place, gates[chunk] * grad, chunk, WIDTH, CHUNK)
            if SUMS:
                source = update + batch * update_batch + row * UPDATE_ROW
                dgate = dgates[chunk] + grad * load_chunk(source, chunk, WIDTH, CHUNK)
                new_dgates = new_dgates + (dgate,)
        if SUMS:
            dgates = new_dgates
    if SUMS:
        place = (batch * tl.num_programs(0) + first) * WIDTH
        for chunk in tl.static_range(CHUNKS):
            store_chunk(gate_sums + place, dgates[chunk], chunk, WIDTH, CHUNK)


_launch = Launcher(_kernel)


def _backward(
    dy: Tensor,
    gate: Tensor,
    update: Tensor | None,
    dupdate: Tensor,
    sums: Tensor | None,
) -> None:
    """Writes gate * dy into `dupdate` and, if given, each program's sum of update * dy into `sums`."""
    dy, gate = readable(dy), readable(gate)
    other = dy if update is None else readable(update)  # dy is a placeholder that is never read
    batch, rows, width = dy.shape
    if dy.numel() == 0:
        return
    tile = row_tile(width)
    _launch(
        (rows if sums is None else sums.shape[1], batch, 1),
        (
            dy,
            gate,
            other,
            dupdate,
            dupdate if sums is None else sums,
            rows,
            dy.stride(0),
            other.stride(0),
            gate.stride(0),
            dupdate.stride(0),
        ),
        (
            dy.stride(1),
            other.stride(1),
            dupdate.stride(1),
            width,
            sums is not None,
            tile.chunk,
            tile.chunks,
        ),
        num_warps=tile.warps,
    )


def gated_residual_backward(dy: Tensor, gate: Tensor, out: Tensor | None = None) -> Tensor:
    """Computes `halfbyte.kernels.modulation.reference.gated_residual_backward` in one launch."""
    dupdate = target(out, dy)
    _backward(dy, gate, None, dupdate, None)
    return dupdate


def gated_residual_grads(
    dy: Tensor, gate: Tensor, update: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes `halfbyte.kernels.modulation.reference.gated_residual_grads` in two launches."""
    dupdate = target(out, dy)
    sums = partial_sums(dy)
    _backward(dy, gate, update, dupdate, sums)
    return dupdate, add_up(sums, gate.dtype)
