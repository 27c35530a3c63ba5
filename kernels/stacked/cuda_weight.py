"""Triton kernel that dequantizes a 4-bit weight into a wider matrix, next to its adapter's B, in one launch.

Row n of the result is [weight row n (K) | scale * B row n, zero-padded (columns)]. One product of
this matrix with [x | x A^T] then gives the layer's output with its adapter. The weight's values
are bitwise identical to those of `halfbyte.kernels.quantize_4bit.cuda`; only their place differs,
because the rows of the result are further apart.
"""

import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.quantize_4bit.cuda import launches_early
from halfbyte.kernels.quantize_4bit.cuda_blocks import block_scale, in_range, lookup, unit_of, unit_pointer
from halfbyte.kernels.quantize_4bit.packed_weight import PackedWeight
from halfbyte.kernels.triton_launch import Launcher

_UNIT = 8  # values that a thread decodes at a time: one 32-bit word
_UNITS = 256  # per program
_WARPS = 4
_ADAPTER_VALUES = 4096  # per program


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
    """Writes the weight with the first programs of the grid and the adapter columns with the rest.

    STRIDE is the row stride of `out`, WIDTH is K, and the adapter's RANK columns start at column WIDTH +
    FIRST. `halfbyte.kernels.quantize_4bit.cuda` explains units and nibbles.
    """
    if EARLY:
        # Launched while the previous kernel still runs: do not read its results before this.
        tl.extra.cuda.gdc_wait()
    packed = unit_pointer(packed, UNIT)
    weight_programs = tl.cdiv(numel, UNITS * UNIT)
    if tl.program_id(0) < weight_programs:
        # UNITS words of the flat row-major weight, int64 because an index may exceed 2^31.
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
        # (UNITS, UNIT) codes. The even value of a byte is its high nibble: shifts 4, 0, 12, 8, ...
        nibbles = (words[:, None] >> ((within ^ 1) * 4)[None, :]) & 15
        values = lookup(code, 16, nibbles) * scale[:, None]
        # K is a multiple of UNIT, so the values of a unit lie within one row.
        row = (first + local) // (WIDTH // UNIT)
        start = row * STRIDE + (first + local - row * (WIDTH // UNIT)) * UNIT
        tl.store(
            out + tl.multiple_of(start, UNIT)[:, None] + within[None, :],
            values.to(out.dtype.element_ty),
            mask=in_range(local[:, None] * UNIT + within[None, :], left, EVEN),
        )
    else:
        # Adapter columns (N, COLUMNS): fp32 B times the scale, zeros outside of
        # the RANK columns, rounded once.
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
    """Returns True if the kernel can dequantize this weight: on CUDA, with rows of whole 32-bit words."""
    return (
        weight.packed.is_cuda
        and weight.shape[1] % _UNIT == 0
        and unit_of(weight.packed, weight.shape[0] * weight.shape[1]) == _UNIT
    )


def stack_weight(
    out: Tensor, weight: PackedWeight, up: Tensor | None, scale: float, first: int, columns: int
) -> None:
    """Fills out (N, K + columns), a view with any row stride, with the weight (N, K) and its scaled adapter.

    `up` (N, rank) fp32 times `scale` goes to the columns from K + first. The
    rest of the last `columns` becomes zero.

    Raises:
        ValueError: if a field of the weight does not fit the others.
    """
    weight.check()
    outputs, width = weight.shape
    numel = outputs * width
    adapter_numel = outputs * columns
    units = max(_UNITS, weight.blocksize // _UNIT)
    programs = triton.cdiv(numel, units * _UNIT) + triton.cdiv(adapter_numel, _ADAPTER_VALUES)
    early = launches_early(out.device)
    absent = weight.absmax  # a placeholder for operands that this weight lacks, never read
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
