"""A 4-bit weight dequantized into the rows of a wider matrix, its adapter beside it, in one launch.

Values are bit for bit those of `nf4_triton`; what differs is where they go: row n of the weight to row n of a
matrix whose rows are further apart.
"""

import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.quantize_4bit.cuda import launches_early
from halfbyte.kernels.quantize_4bit.cuda_blocks import block_scale, in_range, lookup, unit_of, unit_pointer
from halfbyte.kernels.quantize_4bit.packed_weight import PackedWeight
from halfbyte.kernels.triton_launch import Launcher

_UNIT = 8  # values a thread takes at a time: one 32-bit word
_UNITS = 256  # a program
_WARPS = 4
_ADAPTER_VALUES = 4096  # a program


@triton.jit
def _stack_kernel(
    packed,
    absmax,
    nested_absmax,
    offset,
    code,
    nested_code,
    up,
    out,
    numel,
    adapter_numel,
    up_scale,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    RANK: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    ADAPTER_VALUES: tl.constexpr,
    DOUBLE: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_wait()
    packed = unit_pointer(packed, UNIT)
    weight_programs = tl.cdiv(numel, UNITS * UNIT)
    if tl.program_id(0) < weight_programs:
        first = tl.program_id(0).to(tl.int64) * UNITS
        local = tl.arange(0, UNITS)
        within = tl.arange(0, UNIT)
        left = numel - first * UNIT
        unit_mask = in_range(local * UNIT, left, EVEN)
        words = tl.load(
            tl.max_contiguous(packed + first + local, [1]),
            mask=unit_mask,
            other=0,
            eviction_policy="evict_first",
        ).to(tl.int32)
        block = (first * UNIT // BLOCKSIZE).to(tl.int32) + local * UNIT // BLOCKSIZE
        scale = block_scale(
            absmax, nested_absmax, offset, nested_code, block, unit_mask, NESTED_BLOCKSIZE, DOUBLE
        )
        nibbles = (words[:, None] >> ((within ^ 1) * 4)[None, :]) & 15
        values = lookup(code, 16, nibbles) * scale[:, None]
        # The width is a multiple of the unit, so a unit lies within one row.
        row = (first + local) // (WIDTH // UNIT)
        start = row * STRIDE + (first + local - row * (WIDTH // UNIT)) * UNIT
        tl.store(
            out + tl.multiple_of(start, UNIT)[:, None] + within[None, :],
            values.to(out.dtype.element_ty),
            mask=in_range(local[:, None] * UNIT + within[None, :], left, EVEN),
        )
    else:
        index = (tl.program_id(0) - weight_programs) * ADAPTER_VALUES + tl.arange(0, ADAPTER_VALUES)
        up_row = index // COLUMNS
        column = index % COLUMNS
        own = (column >= FIRST) & (column < FIRST + RANK) & (index < adapter_numel)
        factor = tl.load(up + up_row * RANK + column - FIRST, mask=own, other=0.0).to(tl.float32) * up_scale
        tl.store(
            out + up_row.to(tl.int64) * STRIDE + WIDTH + column,
            factor.to(out.dtype.element_ty),
            mask=index < adapter_numel,
        )


_launch_stack = Launcher(_stack_kernel, enable_fp_fusion=False)


def supports(weight: PackedWeight) -> bool:
    """Whether the kernel can take this weight: CUDA, and rows of whole words."""
    return (
        weight.packed.is_cuda
        and weight.shape[1] % _UNIT == 0
        and unit_of(weight.packed, weight.shape[0] * weight.shape[1]) == _UNIT
    )


def stack_weight(
    out: Tensor, weight: PackedWeight, up: Tensor | None, scale: float, first: int, columns: int
) -> None:
    """Fills out (N, K + columns), a view with any row stride: the weight (N, K), and up (N, rank) fp32 times scale in
    the columns from K + first, zeros in the rest of `columns`."""
    weight.check()
    outputs, width = weight.shape
    numel = outputs * width
    adapter_numel = outputs * columns
    units = max(_UNITS, weight.blocksize // _UNIT)
    programs = triton.cdiv(numel, units * _UNIT) + triton.cdiv(adapter_numel, _ADAPTER_VALUES)
    early = launches_early(out.device)
    absent = weight.absmax
    _launch_stack(
        (programs, 1, 1),
        (
            weight.packed,
            weight.absmax,
            weight.nested_absmax if weight.nested_absmax is not None else absent,
            weight.offset if weight.offset is not None else absent,
            weight.code,
            weight.nested_code if weight.nested_code is not None else absent,
            absent if up is None else up,
            out,
            numel,
            adapter_numel,
            float(scale),
        ),
        (
            width,
            out.stride(0),
            0 if up is None else up.shape[1],
            first,
            max(columns, 1),
            weight.blocksize,
            weight.nested_blocksize,
            _UNIT,
            units,
            _ADAPTER_VALUES,
            weight.nested_absmax is not None,
            numel % (units * _UNIT) == 0,
            early,
        ),
        num_warps=_WARPS,
        launch_pdl=early,
    )
