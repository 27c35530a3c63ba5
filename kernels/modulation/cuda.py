"""Triton kernels for LayerNorm with modulation (forward, backward) and for the gated residual (forward).

Every kernel reads its streams once and writes each result once. Results equal the reference's except for the
order of additions. `halfbyte.kernels.row_chunks` explains how a row is kept in registers.
"""

# Triton joins tuples with + and has no unpacking; to a type checker a tuple's length is part of its type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.modulation.reference import FP16_LARGEST
from halfbyte.kernels.row_chunks import (
    add_up,
    load_chunk,
    partial_sums,
    readable,
    row_statistics,
    row_tile,
    store_chunk,
    target,
)
from halfbyte.kernels.triton_launch import Launcher

_LARGEST = tl.constexpr(FP16_LARGEST)


@triton.jit
def _norm_kernel(
    x,
    scale,
    shift,
    out,
    rows,
    x_batch,
    scale_batch,
    shift_batch,
    out_batch,
    eps,
    X_ROW: tl.constexpr,
    OUT_ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Computes out = (x - mean) / std * (1 + scale) + shift. Grid: (rows, B), one program per row."""
    first = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    # Modulation belongs to the batch element: a program that handled several rows would load it once.
    scales = ()
    shifts = ()
    for chunk in tl.static_range(CHUNKS):
        scales = scales + (1 + load_chunk(scale + batch * scale_batch, chunk, WIDTH, CHUNK),)
        shifts = shifts + (load_chunk(shift + batch * shift_batch, chunk, WIDTH, CHUNK),)
    for row in range(first, rows, tl.num_programs(0)):
        # The whole row stays in registers as fp32, between the statistics and the output.
        values = ()
        for chunk in tl.static_range(CHUNKS):
            values = values + (load_chunk(x + batch * x_batch + row * X_ROW, chunk, WIDTH, CHUNK),)
        mean, factor = row_statistics(values, eps, WIDTH, CHUNK, CHUNKS)
        for chunk in tl.static_range(CHUNKS):
            value = (values[chunk] - mean) * factor * scales[chunk] + shifts[chunk]
            store_chunk(out + batch * out_batch + row * OUT_ROW, value, chunk, WIDTH, CHUNK)


@triton.jit
def _residual_kernel(
    x,
    gate,
    update,
    out,
    rows,
    x_batch,
    update_batch,
    gate_batch,
    out_batch,
    X_ROW: tl.constexpr,
    UPDATE_ROW: tl.constexpr,
    OUT_ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    CLIP: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Computes out = x + gate * update, clipped to fp16's finite range with CLIP. Grid: (rows, B)."""
    first = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    gates = ()
    for chunk in tl.static_range(CHUNKS):
        gates = gates + (load_chunk(gate + batch * gate_batch, chunk, WIDTH, CHUNK),)
    for row in range(first, rows, tl.num_programs(0)):
        for chunk in tl.static_range(CHUNKS):
            value = load_chunk(x + batch * x_batch + row * X_ROW, chunk, WIDTH, CHUNK)
            source = update + batch * update_batch + row * UPDATE_ROW
            value += gates[chunk] * load_chunk(source, chunk, WIDTH, CHUNK)
            if CLIP:
                # Clips infinities but keeps NaN, like torch.clamp; by default tl.maximum would drop NaN.
                value = tl.maximum(value, -_LARGEST, propagate_nan=tl.PropagateNan.ALL)
                value = tl.minimum(value, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
            store_chunk(out + batch * out_batch + row * OUT_ROW, value, chunk, WIDTH, CHUNK)


@triton.jit
def _norm_backward_kernel(
    dy,
    x,
    scale,
    residual_grad,
    dx,
    scale_sums,
    shift_sums,
    rows,
    dy_batch,
    x_batch,
    residual_batch,
    scale_batch,
    eps,
    DY_ROW: tl.constexpr,
    X_ROW: tl.constexpr,
    RESIDUAL_ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SUMS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Computes dx, and with SUMS each program's partial sums of dscale and dshift.

    With n = (x - mean) * factor, factor = 1 / std, g = dy * (1 + scale) and means over the row:

        dx = factor * (g - mean(g) - n * mean(g * n))  [+ residual_grad]
        dscale = sum over rows of dy * n,  dshift = sum over rows of dy

    Grid: (rows, B), or with SUMS (programs, B) where each program loops over rows.
    """
    first = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    scales = ()
    # fp32 accumulators over this program's rows, in registers until the end.
    dscales = ()
    dshifts = ()
    for chunk in tl.static_range(CHUNKS):
        scales = scales + (1 + load_chunk(scale + batch * scale_batch, chunk, WIDTH, CHUNK),)
        if SUMS:
            dscales = dscales + (tl.zeros((CHUNK,), tl.float32),)
            dshifts = dshifts + (tl.zeros((CHUNK,), tl.float32),)
    for row in range(first, rows, tl.num_programs(0)):
        out = (batch * rows + row) * WIDTH  # dx is contiguous
        # x and dy of the row stay in registers. Forward saved no statistics: they are computed from x again.
        values = ()
        grads = ()
        for chunk in tl.static_range(CHUNKS):
            values = values + (load_chunk(x + batch * x_batch + row * X_ROW, chunk, WIDTH, CHUNK),)
            grads = grads + (load_chunk(dy + batch * dy_batch + row * DY_ROW, chunk, WIDTH, CHUNK),)
        mean, factor = row_statistics(values, eps, WIDTH, CHUNK, CHUNKS)
        # First pass over the chunks: mean(g), mean(g * n), and the sums for the modulation.
        total = tl.zeros((CHUNK,), tl.float32)  # g
        along = tl.zeros((CHUNK,), tl.float32)  # g * n
        # Triton cannot assign to an element of a tuple, so each row builds new tuples of accumulators.
        new_dscales = ()
        new_dshifts = ()
        # In the padding n is not 0, but dy is, and so is everything summed here.
        for chunk in tl.static_range(CHUNKS):
            normalized = (values[chunk] - mean) * factor
            total += grads[chunk] * scales[chunk]
            along += grads[chunk] * scales[chunk] * normalized
            if SUMS:
                new_dscales = new_dscales + (dscales[chunk] + grads[chunk] * normalized,)
                new_dshifts = new_dshifts + (dshifts[chunk] + grads[chunk],)
        if SUMS:
            dscales = new_dscales
            dshifts = new_dshifts
        mean_grad = tl.sum(total, axis=0) / WIDTH
        mean_along = tl.sum(along, axis=0) / WIDTH
        # Second pass: dx. n is computed again rather than kept in registers.
        for chunk in tl.static_range(CHUNKS):
            normalized = (values[chunk] - mean) * factor
            grad = (grads[chunk] * scales[chunk] - mean_grad - normalized * mean_along) * factor
            if RESIDUAL:
                # The gradient that reaches x through the residual branch, added before the only rounding.
                source = residual_grad + batch * residual_batch + row * RESIDUAL_ROW
                grad += load_chunk(source, chunk, WIDTH, CHUNK)
            store_chunk(dx + out, grad, chunk, WIDTH, CHUNK)
    if SUMS:
        place = (batch * tl.num_programs(0) + first) * WIDTH
        for chunk in tl.static_range(CHUNKS):
            store_chunk(scale_sums + place, dscales[chunk], chunk, WIDTH, CHUNK)
            store_chunk(shift_sums + place, dshifts[chunk], chunk, WIDTH, CHUNK)


_launch_norm = Launcher(_norm_kernel)
_launch_residual = Launcher(_residual_kernel)
_launch_norm_backward = Launcher(_norm_backward_kernel)


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """Computes `halfbyte.kernels.modulation.reference.layer_norm_modulate` in one launch."""
    normed = target(out, x)
    x, scale, shift = readable(x), readable(scale), readable(shift)
    batch, rows, width = x.shape
    if x.numel() == 0:
        return normed
    tile = row_tile(width)
    _launch_norm(
        (rows, batch, 1),
        (
            x,
            scale,
            shift,
            normed,
            rows,
            x.stride(0),
            scale.stride(0),
            shift.stride(0),
            normed.stride(0),
            eps,
        ),
        (x.stride(1), normed.stride(1), width, tile.chunk, tile.chunks),
        num_warps=tile.warps,
    )
    return normed


def gated_residual(x: Tensor, gate: Tensor, update: Tensor, clip: bool, out: Tensor | None = None) -> Tensor:
    """Computes `halfbyte.kernels.modulation.reference.gated_residual` in one launch."""
    y = target(out, x)
    clips = clip and x.dtype == torch.float16
    x, gate, update = readable(x), readable(gate), readable(update)
    batch, rows, width = x.shape
    if x.numel() == 0:
        return y
    tile = row_tile(width)
    _launch_residual(
        (rows, batch, 1),
        (
            x,
            gate,
            update,
            y,
            rows,
            x.stride(0),
            update.stride(0),
            gate.stride(0),
            y.stride(0),
        ),
        (x.stride(1), update.stride(1), y.stride(1), width, clips, tile.chunk, tile.chunks),
        num_warps=tile.warps,
    )
    return y


def _norm_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    residual_grad: Tensor | None,
    eps: float,
    sums: Sequence[Tensor],
) -> Tensor:
    """Returns dx. Fills `sums`, if not empty, with each program's partial sums for dscale and dshift."""
    dy, x, scale = readable(dy), readable(x), readable(scale)
    residual = x if residual_grad is None else readable(residual_grad)  # x is only a placeholder, never read
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    batch, rows, width = x.shape
    if x.numel() == 0:
        return dx
    tile = row_tile(width)
    _launch_norm_backward(
        (sums[0].shape[1] if sums else rows, batch, 1),
        (
            dy,
            x,
            scale,
            residual,
            dx,
            *(sums or (dx, dx)),
            rows,
            dy.stride(0),
            x.stride(0),
            residual.stride(0),
            scale.stride(0),
            eps,
        ),
        (
            dy.stride(1),
            x.stride(1),
            residual.stride(1),
            width,
            residual_grad is not None,
            bool(sums),
            tile.chunk,
            tile.chunks,
        ),
        num_warps=tile.warps,
    )
    return dx


def layer_norm_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, residual_grad: Tensor | None, eps: float
) -> Tensor:
    """Computes `halfbyte.kernels.modulation.reference.layer_norm_modulate_backward` in one launch."""
    return _norm_backward(dy, x, scale, residual_grad, eps, ())


def layer_norm_modulate_grads(
    dy: Tensor, x: Tensor, scale: Tensor, residual_grad: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `halfbyte.kernels.modulation.reference.layer_norm_modulate_grads` in three launches.

    The first computes dx and partial sums, the other two add those up to dscale and dshift.
    """
    sums = partial_sums(x), partial_sums(x)
    dx = _norm_backward(dy, x, scale, residual_grad, eps, sums)
    return dx, add_up(sums[0], scale.dtype), add_up(sums[1], scale.dtype)
