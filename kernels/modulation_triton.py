"""LayerNorm with modulation and the gated residual on CUDA: each stream is read once and written once.

A program takes one row at a time, in a few chunks that stay in registers between the statistics and the result, and
a few rows one after the other, for which modulation is loaded once. The numbers are the reference's but for the order
of sums. Gradients of modulation, sums over the rows of a sample, are made in two stages, the same in every run: a sum
a program, then the sum of those.
"""

# Triton joins tuples by + and knows no unpacking; to a type checker a tuple's length is its type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.elementwise_reference import FP16_LARGEST

_LANE_VALUES = 8  # 16 bytes of a 16-bit type: what a lane loads at once
_CHUNKS = (256, 512, 1024, 2048, 4096)
_MOST_CHUNKS = 8
_WANTED_PROGRAMS = 1056  # eight on each of an H200's 132 multiprocessors
_WANTED_SUMS = 264  # programs where each leaves a sum to be added

_LARGEST = tl.constexpr(FP16_LARGEST)


@triton.jit
def _load(pointer, start, lane, width, CHUNK: tl.constexpr):
    column = start * CHUNK + lane
    return tl.load(pointer + column, mask=column < width, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, value, start, lane, width, CHUNK: tl.constexpr):
    column = start * CHUNK + lane
    tl.store(pointer + column, value.to(pointer.dtype.element_ty), mask=column < width)


@triton.jit
def _statistics(values, lane, width, eps, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Mean and 1 / standard deviation of a row in chunks, of which what lies beyond the width is 0."""
    total = tl.zeros((CHUNK,), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        total += values[chunk]
    mean = tl.sum(total, axis=0) / width
    squares = tl.zeros((CHUNK,), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        centred = tl.where(chunk * CHUNK + lane < width, values[chunk] - mean, 0.0)
        squares += centred * centred
    return mean, tl.rsqrt(tl.sum(squares, axis=0) / width + eps)


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
    width,
    eps,
    x_batch,
    x_row,
    update_batch,
    update_row,
    gate_batch,
    scale_batch,
    shift_batch,
    rows_each,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    CLIP: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows_each
    batch = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, CHUNK)
    gates = ()
    scales = ()
    shifts = ()
    for chunk in tl.static_range(CHUNKS):
        if GATED:
            gates = gates + (_load(gate + batch * gate_batch, chunk, lane, width, CHUNK),)
        if NORM:
            scales = scales + (1 + _load(scale + batch * scale_batch, chunk, lane, width, CHUNK),)
            shifts = shifts + (_load(shift + batch * shift_batch, chunk, lane, width, CHUNK),)
    for row in range(first, tl.minimum(first + rows_each, rows)):
        values = ()
        out = (batch * rows + row) * width
        for chunk in tl.static_range(CHUNKS):
            value = _load(x + batch * x_batch + row * x_row, chunk, lane, width, CHUNK)
            if GATED:
                source = update + batch * update_batch + row * update_row
                value += gates[chunk] * _load(source, chunk, lane, width, CHUNK)
                if CLIP:
                    value = tl.maximum(value, -_LARGEST, propagate_nan=tl.PropagateNan.ALL)
                    value = tl.minimum(value, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
                _store(y + out, value, chunk, lane, width, CHUNK)
                value = value.to(y.dtype.element_ty).to(tl.float32)
            values = values + (value,)
        if NORM:
            mean, factor = _statistics(values, lane, width, eps, CHUNK, CHUNKS)
            for chunk in tl.static_range(CHUNKS):
                value = (values[chunk] - mean) * factor * scales[chunk] + shifts[chunk]
                _store(normed + out, value, chunk, lane, width, CHUNK)


@triton.jit
def _norm_backward_kernel(
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
    width,
    eps,
    dy_batch,
    dy_row,
    x_batch,
    x_row,
    residual_batch,
    residual_row,
    scale_batch,
    gate_batch,
    rows_each,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    SUMS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows_each
    batch = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, CHUNK)
    gates = ()
    scales = ()
    dscales = ()
    dshifts = ()
    for chunk in tl.static_range(CHUNKS):
        scales = scales + (1 + _load(scale + batch * scale_batch, chunk, lane, width, CHUNK),)
        if GATED:
            gates = gates + (_load(gate + batch * gate_batch, chunk, lane, width, CHUNK),)
        if SUMS:
            dscales = dscales + (tl.zeros((CHUNK,), tl.float32),)
            dshifts = dshifts + (tl.zeros((CHUNK,), tl.float32),)
    for row in range(first, tl.minimum(first + rows_each, rows)):
        out = (batch * rows + row) * width
        values = ()
        grads = ()
        for chunk in tl.static_range(CHUNKS):
            source = x + batch * x_batch + row * x_row
            values = values + (_load(source, chunk, lane, width, CHUNK),)
            source = dy + batch * dy_batch + row * dy_row
            grads = grads + (_load(source, chunk, lane, width, CHUNK),)
        mean, factor = _statistics(values, lane, width, eps, CHUNK, CHUNKS)
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
        mean_grad = tl.sum(total, axis=0) / width
        mean_along = tl.sum(along, axis=0) / width
        for chunk in tl.static_range(CHUNKS):
            normalized = (values[chunk] - mean) * factor
            grad = (grads[chunk] * scales[chunk] - mean_grad - normalized * mean_along) * factor
            if RESIDUAL:
                source = residual_grad + batch * residual_batch + row * residual_row
                grad += _load(source, chunk, lane, width, CHUNK)
            _store(dx + out, grad, chunk, lane, width, CHUNK)
            if GATED:
                rounded = grad.to(dx.dtype.element_ty).to(tl.float32)
                _store(dupdate + out, gates[chunk] * rounded, chunk, lane, width, CHUNK)
    if SUMS:
        place = (batch * tl.num_programs(0) + tl.program_id(0)) * width
        for chunk in tl.static_range(CHUNKS):
            _store(scale_sums + place, dscales[chunk], chunk, lane, width, CHUNK)
            _store(shift_sums + place, dshifts[chunk], chunk, lane, width, CHUNK)


@triton.jit
def _gate_backward_kernel(
    dy,
    gate,
    update,
    dupdate,
    gate_sums,
    rows,
    width,
    dy_batch,
    dy_row,
    update_batch,
    update_row,
    gate_batch,
    rows_each,
    SUMS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows_each
    batch = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, CHUNK)
    gates = ()
    dgates = ()
    for chunk in tl.static_range(CHUNKS):
        gates = gates + (_load(gate + batch * gate_batch, chunk, lane, width, CHUNK),)
        if SUMS:
            dgates = dgates + (tl.zeros((CHUNK,), tl.float32),)
    for row in range(first, tl.minimum(first + rows_each, rows)):
        new_dgates = ()
        for chunk in tl.static_range(CHUNKS):
            grad = _load(dy + batch * dy_batch + row * dy_row, chunk, lane, width, CHUNK)
            _store(dupdate + (batch * rows + row) * width, gates[chunk] * grad, chunk, lane, width, CHUNK)
            if SUMS:
                source = update + batch * update_batch + row * update_row
                dgate = dgates[chunk] + grad * _load(source, chunk, lane, width, CHUNK)
                new_dgates = new_dgates + (dgate,)
        if SUMS:
            dgates = new_dgates
    if SUMS:
        place = (batch * tl.num_programs(0) + tl.program_id(0)) * width
        for chunk in tl.static_range(CHUNKS):
            _store(gate_sums + place, dgates[chunk], chunk, lane, width, CHUNK)


@triton.jit
def _sum_kernel(sums, out, count, width, DEPTH: tl.constexpr, TILE: tl.constexpr):
    """out (B, D) of sums (B, count, D)."""
    batch = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)[None, :]
    total = tl.zeros((DEPTH, TILE), tl.float32)
    for start in range(0, count, DEPTH):
        place = start + tl.arange(0, DEPTH)[:, None]
        inside = (place < count) & (column < width)
        total += tl.load(sums + (batch * count + place) * width + column, mask=inside, other=0.0)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    value = tl.sum(total, axis=0)
    tl.store(out + batch * width + column, value.to(out.dtype.element_ty), mask=column < width)


def _chunks(width: int) -> tuple[int, int]:
    """(values in a chunk, chunks) for rows of `width`: the least padding, then the fewest chunks."""
    fitting = [(chunk, triton.cdiv(width, chunk)) for chunk in _CHUNKS if width <= chunk * _MOST_CHUNKS]
    if not fitting:
        most = _CHUNKS[-1] * _MOST_CHUNKS
        raise ValueError(f"x: got rows of {width}, expected at most {most}, which a program's registers hold")
    return min(fitting, key=lambda choice: (choice[0] * choice[1], choice[1]))


def _readable(tensor: Tensor) -> Tensor:
    """The tensor, its last dimension contiguous: a slice as it lies, anything else copied."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _rows_each(stream: Tensor, programs: int) -> int:
    """Rows that a program takes, so that there are about `programs` in all."""
    batch, rows, _ = stream.shape
    return max(1, triton.cdiv(batch * rows, programs))


def _launch(kernel: triton.JITFunction, stream: Tensor, rows_each: int, *arguments, **flags) -> None:
    """`kernel` over rows like those of `stream`, `rows_each` a program."""
    batch, rows, width = stream.shape
    if stream.numel() == 0:
        return
    chunk, chunks = _chunks(width)
    with torch.cuda.device_of(stream):
        kernel[(triton.cdiv(rows, rows_each), batch)](
            *arguments,
            rows_each,
            **flags,
            CHUNK=chunk,
            CHUNKS=chunks,
            num_warps=max(1, chunk // (32 * _LANE_VALUES)),
        )


def _forward(
    x: Tensor,
    gated: tuple[Tensor, Tensor] | None,
    modulation: tuple[Tensor, Tensor] | None,
    eps: float,
    clip: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(x + gate * update, its modulated norm), either where asked for; x itself is normed where nothing is added."""
    x = _readable(x)
    gate, update = (x, x) if gated is None else map(_readable, gated)
    scale, shift = (x, x) if modulation is None else map(_readable, modulation)
    y = None if gated is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = None if modulation is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(
        _forward_kernel,
        x,
        _rows_each(x, _WANTED_PROGRAMS),
        x,
        gate,
        update,
        scale,
        shift,
        x if y is None else y,
        x if normed is None else normed,
        x.shape[1],
        x.shape[2],
        eps,
        *x.stride()[:2],
        *update.stride()[:2],
        gate.stride(0),
        scale.stride(0),
        shift.stride(0),
        GATED=gated is not None,
        NORM=modulation is not None,
        CLIP=clip and x.dtype == torch.float16,
    )
    return y, normed


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """`elementwise_reference.layer_norm_modulate` in one launch."""
    _, normed = _forward(x, None, (scale, shift), eps, False)
    assert normed is not None
    return normed


def gated_residual(x: Tensor, gate: Tensor, update: Tensor, clip: bool) -> Tensor:
    """`elementwise_reference.gated_residual` in one launch."""
    y, _ = _forward(x, (gate, update), None, 0.0, clip)
    assert y is not None
    return y


def gated_norm(
    x: Tensor, gate: Tensor, update: Tensor, scale: Tensor, shift: Tensor, eps: float, clip: bool
) -> tuple[Tensor, Tensor]:
    """`elementwise_reference.gated_norm` in one launch."""
    y, normed = _forward(x, (gate, update), (scale, shift), eps, clip)
    assert y is not None
    assert normed is not None
    return y, normed


def _sum(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """sums (B, count, D) fp32 over its middle dimension, always in the same order."""
    batch, count, width = sums.shape
    out = torch.empty((batch, width), dtype=dtype, device=sums.device)
    if out.numel():
        with torch.cuda.device_of(sums):
            _sum_kernel[(triton.cdiv(width, 32), batch)](
                sums, out, count, width, DEPTH=64, TILE=32, num_warps=4
            )
    return out


def _sums_like(stream: Tensor, rows_each: int) -> Tensor:
    batch, rows, width = stream.shape
    shape = (batch, triton.cdiv(rows, rows_each), width)
    return torch.empty(shape, dtype=torch.float32, device=stream.device)


def _norm_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    residual_grad: Tensor | None,
    gate: Tensor | None,
    eps: float,
    sums: tuple[Tensor, Tensor] | None,
    rows_each: int,
) -> tuple[Tensor, Tensor | None]:
    """(dx, gate * dx where there is a gate), with each program's sums for dscale and dshift where they are given."""
    dy, x, scale = map(_readable, (dy, x, scale))
    residual = x if residual_grad is None else _readable(residual_grad)
    gates = scale if gate is None else _readable(gate)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dupdate = None if gate is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(
        _norm_backward_kernel,
        x,
        rows_each,
        dy,
        x,
        scale,
        residual,
        gates,
        dx,
        dx if dupdate is None else dupdate,
        *((dx, dx) if sums is None else sums),
        x.shape[1],
        x.shape[2],
        eps,
        *dy.stride()[:2],
        *x.stride()[:2],
        *residual.stride()[:2],
        scale.stride(0),
        gates.stride(0),
        RESIDUAL=residual_grad is not None,
        GATED=gate is not None,
        SUMS=sums is not None,
    )
    return dx, dupdate


def layer_norm_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, residual_grad: Tensor | None, eps: float
) -> Tensor:
    """`elementwise_reference.layer_norm_modulate_backward` in one launch."""
    rows_each = _rows_each(x, _WANTED_PROGRAMS)
    return _norm_backward(dy, x, scale, residual_grad, None, eps, None, rows_each)[0]


def layer_norm_modulate_grads(
    dy: Tensor, x: Tensor, scale: Tensor, residual_grad: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`elementwise_reference.layer_norm_modulate_grads` in one launch and one for each sum."""
    rows_each = _rows_each(x, _WANTED_SUMS)
    sums = (_sums_like(x, rows_each), _sums_like(x, rows_each))
    dx, _ = _norm_backward(dy, x, scale, residual_grad, None, eps, sums, rows_each)
    return dx, _sum(sums[0], scale.dtype), _sum(sums[1], scale.dtype)


def gated_norm_backward(
    dnormed: Tensor, y: Tensor, gate: Tensor, scale: Tensor, residual_grad: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`elementwise_reference.gated_norm_backward` in one launch."""
    rows_each = _rows_each(y, _WANTED_PROGRAMS)
    dx, dupdate = _norm_backward(dnormed, y, scale, residual_grad, gate, eps, None, rows_each)
    assert dupdate is not None
    return dx, dupdate


def _gate_backward(
    dy: Tensor, gate: Tensor, update: Tensor | None, sums: Tensor | None, rows_each: int
) -> Tensor:
    dy, gate = _readable(dy), _readable(gate)
    other = dy if update is None else _readable(update)
    dupdate = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
    _launch(
        _gate_backward_kernel,
        dy,
        rows_each,
        dy,
        gate,
        other,
        dupdate,
        dupdate if sums is None else sums,
        dy.shape[1],
        dy.shape[2],
        *dy.stride()[:2],
        *other.stride()[:2],
        gate.stride(0),
        SUMS=sums is not None,
    )
    return dupdate


def gated_residual_backward(dy: Tensor, gate: Tensor) -> Tensor:
    """`elementwise_reference.gated_residual_backward` in one launch."""
    return _gate_backward(dy, gate, None, None, _rows_each(dy, _WANTED_PROGRAMS))


def gated_residual_grads(dy: Tensor, gate: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """`elementwise_reference.gated_residual_grads` in one launch and one for the sum."""
    rows_each = _rows_each(dy, _WANTED_SUMS)
    sums = _sums_like(dy, rows_each)
    return _gate_backward(dy, gate, update, sums, rows_each), _sum(sums, gate.dtype)
