"""LayerNorm with modulation and the gated residual before it on CUDA: a stream is read once and written once.

The numbers are the reference's but for the order of sums.
"""

# Triton joins tuples by + and knows no unpacking; to a type checker a tuple's length is its type.
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
def _forward_kernel(
    x,
    gate,
    update,
    scale,
    shift,
    y,
    normed,
    rows,
    x_batch,
    update_batch,
    gate_batch,
    scale_batch,
    shift_batch,
    y_batch,
    normed_batch,
    eps,
    X_ROW: tl.constexpr,
    UPDATE_ROW: tl.constexpr,
    Y_ROW: tl.constexpr,
    NORMED_ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    gates = ()
    scales = ()
    shifts = ()
    for chunk in tl.static_range(CHUNKS):
        if GATED:
            gates = gates + (load_chunk(gate + batch * gate_batch, chunk, WIDTH, CHUNK),)
        if NORM:
            scales = scales + (1 + load_chunk(scale + batch * scale_batch, chunk, WIDTH, CHUNK),)
            shifts = shifts + (load_chunk(shift + batch * shift_batch, chunk, WIDTH, CHUNK),)
    for row in range(first, rows, tl.num_programs(0)):
        values = ()
        for chunk in tl.static_range(CHUNKS):
            value = load_chunk(x + batch * x_batch + row * X_ROW, chunk, WIDTH, CHUNK)
            if GATED:
                source = update + batch * update_batch + row * UPDATE_ROW
                value += gates[chunk] * load_chunk(source, chunk, WIDTH, CHUNK)
                if CLIP:
                    value = tl.maximum(value, -_LARGEST, propagate_nan=tl.PropagateNan.ALL)
                    value = tl.minimum(value, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
                store_chunk(y + batch * y_batch + row * Y_ROW, value, chunk, WIDTH, CHUNK)
                value = value.to(y.dtype.element_ty).to(tl.float32)
            values = values + (value,)
        if NORM:
            mean, factor = row_statistics(values, eps, WIDTH, CHUNK, CHUNKS)
            for chunk in tl.static_range(CHUNKS):
                value = (values[chunk] - mean) * factor * scales[chunk] + shifts[chunk]
                store_chunk(normed + batch * normed_batch + row * NORMED_ROW, value, chunk, WIDTH, CHUNK)


@triton.jit
def _backward_kernel(
    dy,
    x,
    scale,
    residual_grad,
    gate,
    dx,
    dupdate,
    scale_sums,
    shift_sums,
    rows,
    dy_batch,
    x_batch,
    residual_batch,
    scale_batch,
    gate_batch,
    dupdate_batch,
    eps,
    DY_ROW: tl.constexpr,
    X_ROW: tl.constexpr,
    RESIDUAL_ROW: tl.constexpr,
    DUPDATE_ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    SUMS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    gates = ()
    scales = ()
    dscales = ()
    dshifts = ()
    for chunk in tl.static_range(CHUNKS):
        scales = scales + (1 + load_chunk(scale + batch * scale_batch, chunk, WIDTH, CHUNK),)
        if GATED:
            gates = gates + (load_chunk(gate + batch * gate_batch, chunk, WIDTH, CHUNK),)
        if SUMS:
            dscales = dscales + (tl.zeros((CHUNK,), tl.float32),)
            dshifts = dshifts + (tl.zeros((CHUNK,), tl.float32),)
    for row in range(first, rows, tl.num_programs(0)):
        out = (batch * rows + row) * WIDTH
        values = ()
        grads = ()
        for chunk in tl.static_range(CHUNKS):
            values = values + (load_chunk(x + batch * x_batch + row * X_ROW, chunk, WIDTH, CHUNK),)
            grads = grads + (load_chunk(dy + batch * dy_batch + row * DY_ROW, chunk, WIDTH, CHUNK),)
        mean, factor = row_statistics(values, eps, WIDTH, CHUNK, CHUNKS)
        total = tl.zeros((CHUNK,), tl.float32)
        along = tl.zeros((CHUNK,), tl.float32)
        new_dscales = ()
        new_dshifts = ()
        # Beyond the width dy is 0, and so is all that is summed here.
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
        for chunk in tl.static_range(CHUNKS):
            normalized = (values[chunk] - mean) * factor
            grad = (grads[chunk] * scales[chunk] - mean_grad - normalized * mean_along) * factor
            if RESIDUAL:
                source = residual_grad + batch * residual_batch + row * RESIDUAL_ROW
                grad += load_chunk(source, chunk, WIDTH, CHUNK)
            store_chunk(dx + out, grad, chunk, WIDTH, CHUNK)
            if GATED:
                rounded = grad.to(dx.dtype.element_ty).to(tl.float32)
                place = dupdate + batch * dupdate_batch + row * DUPDATE_ROW
                store_chunk(place, gates[chunk] * rounded, chunk, WIDTH, CHUNK)
    if SUMS:
        place = (batch * tl.num_programs(0) + first) * WIDTH
        for chunk in tl.static_range(CHUNKS):
            store_chunk(scale_sums + place, dscales[chunk], chunk, WIDTH, CHUNK)
            store_chunk(shift_sums + place, dshifts[chunk], chunk, WIDTH, CHUNK)


_launch_forward = Launcher(_forward_kernel)
_launch_backward = Launcher(_backward_kernel)


def _forward(
    x: Tensor,
    gated: Sequence[Tensor] | None,
    modulation: Sequence[Tensor] | None,
    eps: float,
    clip: bool,
    y: Tensor,
    normed: Tensor,
) -> None:
    """Fills y with x + gate * update and normed with its modulated norm, each where it is asked for."""
    source = readable(x)
    gate, update = (source, source) if gated is None else map(readable, gated)
    scale, shift = (source, source) if modulation is None else map(readable, modulation)
    batch, rows, width = x.shape
    if x.numel() == 0:
        return
    tile = row_tile(width)
    _launch_forward(
        (rows, batch, 1),
        (
            source,
            gate,
            update,
            scale,
            shift,
            y,
            normed,
            rows,
            source.stride(0),
            update.stride(0),
            gate.stride(0),
            scale.stride(0),
            shift.stride(0),
            y.stride(0),
            normed.stride(0),
            eps,
        ),
        (
            source.stride(1),
            update.stride(1),
            y.stride(1),
            normed.stride(1),
            width,
            gated is not None,
            modulation is not None,
            clip and x.dtype == torch.float16,
            tile.chunk,
            tile.chunks,
        ),
        num_warps=tile.warps,
    )


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """`elementwise_reference.layer_norm_modulate` in one launch."""
    normed = target(out, x)
    _forward(x, None, (scale, shift), eps, False, x, normed)
    return normed


def gated_residual(x: Tensor, gate: Tensor, update: Tensor, clip: bool, out: Tensor | None = None) -> Tensor:
    """`elementwise_reference.gated_residual` in one launch."""
    y = target(out, x)
    _forward(x, (gate, update), None, 0.0, clip, y, x)
    return y


def gated_norm(
    x: Tensor,
    gate: Tensor,
    update: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    clip: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`elementwise_reference.gated_norm` in one launch."""
    y, normed = target(None, x), target(out, x)
    _forward(x, (gate, update), (scale, shift), eps, clip, y, normed)
    return y, normed


def _backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    residual_grad: Tensor | None,
    gate: Tensor | None,
    eps: float,
    dupdate: Tensor | None,
    sums: Sequence[Tensor],
) -> Tensor:
    """dx; fills dupdate with gate * dx where there is a gate, and each program's sums for dscale and dshift."""
    dy, x, scale = readable(dy), readable(x), readable(scale)
    residual = x if residual_grad is None else readable(residual_grad)
    gates = scale if gate is None else readable(gate)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gated = dx if dupdate is None else dupdate
    batch, rows, width = x.shape
    if x.numel() == 0:
        return dx
    tile = row_tile(width)
    _launch_backward(
        (sums[0].shape[1] if sums else rows, batch, 1),
        (
            dy,
            x,
            scale,
            residual,
            gates,
            dx,
            gated,
            *(sums or (dx, dx)),
            rows,
            dy.stride(0),
            x.stride(0),
            residual.stride(0),
            scale.stride(0),
            gates.stride(0),
            gated.stride(0),
            eps,
        ),
        (
            dy.stride(1),
            x.stride(1),
            residual.stride(1),
            gated.stride(1),
            width,
            residual_grad is not None,
            gate is not None,
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
    """`elementwise_reference.layer_norm_modulate_backward` in one launch."""
    return _backward(dy, x, scale, residual_grad, None, eps, None, ())


def layer_norm_modulate_grads(
    dy: Tensor, x: Tensor, scale: Tensor, residual_grad: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`elementwise_reference.layer_norm_modulate_grads` in one launch and one for each sum."""
    sums = partial_sums(x), partial_sums(x)
    dx = _backward(dy, x, scale, residual_grad, None, eps, None, sums)
    return dx, add_up(sums[0], scale.dtype), add_up(sums[1], scale.dtype)


def gated_norm_backward(
    dnormed: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    residual_grad: Tensor | None,
    eps: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`elementwise_reference.gated_norm_backward` in one launch."""
    dupdate = target(out, y)
    return _backward(dnormed, y, scale, residual_grad, gate, eps, dupdate, ()), dupdate
