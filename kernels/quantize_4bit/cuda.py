"""Triton kernels for the 4-bit format, bitwise identical to the reference.

Quantizing takes two launches, dequantizing one. Both are written to be limited by memory bandwidth only.

Dequantizing: a thread takes units of eight values, one 32-bit load and one 16-byte store each. Neighboring
threads take neighboring units.

Quantizing: a value takes one table load and one comparison instead of a search. The range [-1, 1] is cut into
cells of 1/64. A cell is narrower than the gap between any two boundaries, so it contains one boundary at
most. The cell's table entry holds this boundary and the rank (index of the interval) below it.

Launches use `enable_fp_fusion=False`, because the format rounds `code * nested_absmax + offset` twice.
"""

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.quantize_4bit import reference
from halfbyte.kernels.quantize_4bit.cuda_blocks import in_range, lookup, read_scale, unit_of, unit_pointer
from halfbyte.kernels.triton_launch import Launcher

# Measured best on an H200 (docs/benchmarks/kernels.md). To dequantize: units per tile, tiles per program. The
# few programs of a small weight all start at once, so instead of overlapping with other programs each
# overlaps its own two tiles.
_TILE = (256, 1)
_TILE_SMALL = (512, 2)
_SMALL_NUMEL = 1 << 24
_DEQUANTIZE_WARPS = 4
_VALUES_PER_PROGRAM = 8192  # to quantize
_QUANTIZE_WARPS = 8

_CELLS = 64  # per unit of the scaled value; a power of two, so that the product is exact
# Adding this to an fp32 value below 2**22 leaves round_half_even(value) + 64 in the low mantissa bits.
_ROUND_TO_BITS = tl.constexpr(1.5 * 2**23 + _CELLS)

# A program stores its sum of absmax values divided by this. A program sums at most that many values, so the
# sum cannot overflow. As a power of two, it does not change the sum's mantissa.
_SUM_SCALE = tl.constexpr(256.0)


@functools.cache
def launches_early(device: torch.device) -> bool:
    """Returns True if a kernel may start before the previous one ends (programmatic dependent launch)."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


@functools.cache
def _cache_bytes(device: torch.device) -> int:
    """Returns the size of the device's L2 cache in bytes; 0 if the device is not CUDA."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


@triton.jit
def _reciprocal(largest):
    """Returns 1 / max(absmax, 1e-38), with the reference's floor that keeps blocks of zeros finite."""
    # 1e-38 is below the smallest normal fp32. Triton would make a plain
    # constant fp64, and everything after it too.
    return tl.div_rn(1.0, tl.maximum(largest, tl.full(largest.shape, 1e-38, tl.float32)))


@triton.jit
def _load_tile(
    packed,
    absmax,
    first,
    numel,
    BLOCKSIZE: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Loads UNITS units from index `first` on: (words, stored absmax per unit, block's index, mask)."""
    local = tl.arange(0, UNITS)
    mask = in_range(local * UNIT, numel - first * UNIT, EVEN)
    # max_contiguous(..., [1]) hides from the compiler that the words are contiguous. It then gives each
    # thread one word out of every 32, which is the layout that the stores need. Otherwise it would load 16
    # bytes per thread and have to shuffle the values between threads.
    words = tl.load(
        tl.max_contiguous(packed + first + local, [1]),
        mask=mask,
        other=0,
        # Read only once per step, so do not evict the dequantized weight, which the next product reads.
        eviction_policy="evict_first",
    ).to(tl.int32)
    block = (first * UNIT // BLOCKSIZE).to(tl.int32) + local * UNIT // BLOCKSIZE
    return words, tl.load(absmax + block, mask=mask, other=0), block, mask


@triton.jit
def _dequantize_kernel(
    packed,
    absmax,
    nested_absmax,
    offset,
    code,
    nested_code,
    out,
    numel,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    TILES: tl.constexpr,
    DOUBLE: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY: tl.constexpr,
    STREAM: tl.constexpr,
):
    """Computes out = code[nibble] * absmax of the block. Grid: (programs,).

    A program handles TILES tiles of UNITS units; consecutive tiles are num_programs tiles apart. It loads the
    next tile before it stores the current one.
    """
    if EARLY:
        # Launched while the previous kernel still runs: do not read its results before this.
        tl.extra.cuda.gdc_wait()
    packed = unit_pointer(packed, UNIT)
    local = tl.arange(0, UNITS)
    within = tl.arange(0, UNIT)
    first = tl.program_id(0).to(tl.int64) * UNITS
    words, stored, block, mask = _load_tile(packed, absmax, first, numel, BLOCKSIZE, UNIT, UNITS, EVEN)
    for tile in tl.static_range(TILES):
        place = first * UNIT
        scale = read_scale(stored, nested_absmax, offset, nested_code, block, mask, NESTED_BLOCKSIZE, DOUBLE)
        # (UNITS, UNIT) codes. The even value of a byte is its high nibble: shifts 4, 0, 12, 8, ...
        nibbles = (words[:, None] >> ((within ^ 1) * 4)[None, :]) & 15
        if tile + 1 < TILES:
            # Prefetch: `words` and `stored` of the current tile are no longer needed.
            first += tl.num_programs(0) * UNITS
            words, stored, block, mask = _load_tile(
                packed, absmax, first, numel, BLOCKSIZE, UNIT, UNITS, EVEN
            )
        values = lookup(code, 16, nibbles) * scale[:, None]
        inside = local[:, None] * UNIT + within[None, :]
        tl.store(
            out + place + inside,
            values.to(out.dtype.element_ty),
            mask=in_range(inside, numel - place, EVEN),
            cache_modifier=".cs" if STREAM else "",
        )


_launch_dequantize = Launcher(_dequantize_kernel, enable_fp_fusion=False)


@functools.cache
def _dequantize_plan(
    numel: int,
    size: int,  # bytes per dequantized value
    unit: int,
    blocksize: int,
    nested_blocksize: int | None,
    device: torch.device,
) -> tuple[tuple[int, int, int], tuple[int | bool, ...], bool]:
    """Returns the grid, the kernel's constants, and True to launch before the previous kernel ends."""
    units, tiles = _TILE_SMALL if numel <= _SMALL_NUMEL else _TILE
    units = max(units, blocksize // unit)
    early = launches_early(device)
    even = numel % (units * unit * tiles) == 0
    # If the dequantized weight does not fit the L2 cache, store it past the cache and keep what is in there.
    stream = numel * size > _cache_bytes(device)
    double = nested_blocksize is not None
    nested = nested_blocksize or blocksize
    constants = (blocksize, nested, unit, units, tiles, double, even, early, stream)
    return (triton.cdiv(numel, units * unit * tiles), 1, 1), constants, early


def _dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None,  # nested_absmax, offset, nested_code
    code: Tensor,
    out: Tensor,
    blocksize: int,
    nested_blocksize: int | None,
) -> None:
    numel = out.numel()
    grid, constants, early = _dequantize_plan(
        numel, out.itemsize, unit_of(packed, numel), blocksize, nested_blocksize, packed.device
    )
    nested_absmax, offset, nested_code = nested or (absmax, absmax, absmax)
    _launch_dequantize(
        grid,
        (packed, absmax, nested_absmax, offset, code, nested_code, out, numel),
        constants,
        num_warps=_DEQUANTIZE_WARPS,
        launch_pdl=early,
    )


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, code: Tensor, shape: Sequence[int], dtype: torch.dtype, blocksize: int
) -> Tensor:
    """Computes `halfbyte.kernels.quantize_4bit.reference.dequantize_4bit` in one launch."""
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    _dequantize(packed, absmax, None, code, out, blocksize, None)
    return out


def dequantize_4bit_double(
    packed: Tensor,
    codes: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    code: Tensor,
    nested_code: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    nested_blocksize: int,
) -> Tensor:
    """Dequantizes a double-quantized weight in one launch, without storing the fp32 absmax."""
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    _dequantize(packed, codes, (nested_absmax, offset, nested_code), code, out, blocksize, nested_blocksize)
    return out


@functools.cache
def cell_table(quant_type: str, device: torch.device) -> Tensor:
    """Returns (256,) int64: each cell's boundary (low 32 bits, as fp32) and the rank below it (high 32 bits).

    A value's cell is round_half_even(64 * value) + 64; FP4 uses the magnitude. A cell without a boundary has
    the boundary infinity, so every value in it gets the rank below. Only cells 0 to 128 occur; the others
    keep the lookup of a NaN within the table.
    """
    boundaries = {"nf4": reference.NF4_BOUNDARIES, "fp4": reference.FP4_BOUNDARIES}[quant_type]
    cells = (torch.round(boundaries * _CELLS) + _CELLS).long()
    assert cells.unique().numel() == cells.numel()
    limit = torch.full((256,), math.inf)
    limit[cells] = boundaries
    rank = torch.bucketize(torch.arange(256), cells)
    return (limit.view(torch.int32).long() & 0xFFFFFFFF | rank << 32).to(device)


@triton.jit
def _quantize_kernel(
    weight,
    cells,
    packed,
    absmax,
    sums,
    numel,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNIT: tl.constexpr,
    FP4: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Quantizes BLOCKS blocks of the flat weight. Grid: (programs,).

    Writes packed codes, absmax, and one partial sum of absmax per program,
    for the offset of double quantization.
    """
    packed = unit_pointer(packed, UNIT)
    first = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCKSIZE)
    left = numel - first
    # Tile (UNITS, UNIT). A thread holds whole units and neighboring threads neighboring
    # units. So loads and stores are contiguous, a block's absmax needs only a few lanes,
    # and packing a unit stays within a thread.
    PER_BLOCK: tl.constexpr = BLOCKSIZE // UNIT
    UNITS: tl.constexpr = BLOCKS * PER_BLOCK
    unit = tl.arange(0, UNITS)
    within = tl.arange(0, UNIT)
    inside = unit[:, None] * UNIT + within[None, :]
    values = tl.load(weight + first + inside, mask=in_range(inside, left, EVEN), other=0.0).to(tl.float32)

    # absmax (BLOCKS,): first over each unit, then over the units of each block.
    largest = tl.max(tl.reshape(tl.max(tl.abs(values), axis=1), (BLOCKS, PER_BLOCK)), axis=1)
    row = tl.arange(0, BLOCKS)
    tl.store(absmax + first // BLOCKSIZE + row, largest, mask=in_range(row * BLOCKSIZE, left, EVEN))
    tl.static_assert(BLOCKS <= _SUM_SCALE)
    tl.store(sums + tl.program_id(0), tl.sum(largest * (1.0 / _SUM_SCALE), axis=0))

    # Repeat each block's reciprocal for its units. A product, not a division, as the format requires.
    inverse = tl.reshape(tl.broadcast_to(_reciprocal(largest)[:, None], (BLOCKS, PER_BLOCK)), (UNITS,))
    scaled = values * inverse[:, None]
    ranked = tl.abs(scaled) if FP4 else scaled
    # The fma adds _ROUND_TO_BITS to 64 * value: the low byte of the result's bits is the cell.
    cell = tl.fma(ranked, 64.0, _ROUND_TO_BITS).to(tl.int32, bitcast=True) & 0xFF
    entry = lookup(cells, 256, cell)
    # code = rank below the boundary, plus 1 if the value is above the boundary.
    limit = entry.to(tl.int32).to(tl.float32, bitcast=True)
    codes = (entry >> 32).to(tl.int32) + (ranked > limit).to(tl.int32)
    if FP4:
        # FP4: map ranks by magnitude to codes 0, 1, 6, 7, 4, 5, 2, 3 (the nibbles of
        # the constant); bit 3 is the sign.
        codes = ((0x32547610 >> (codes * 4)) & 7) | ((scaled < 0).to(tl.int32) * 8)

    # Pack a unit's codes into one word. The shifted codes do not overlap, so their sum is their bitwise or.
    units = tl.sum(codes << ((within ^ 1) * 4)[None, :], axis=1)
    tl.store(
        packed + first // UNIT + unit,
        units.to(packed.dtype.element_ty),
        mask=in_range(unit * UNIT, left, EVEN),
    )


@triton.jit
def _quantize_absmax_kernel(
    absmax,
    sums,
    boundaries,
    codes,
    nested_absmax,
    offset,
    blocks,
    programs,
    NESTED_BLOCKSIZE: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Quantizes GROUP nested blocks of absmax to 8 bits. Grid: (programs,). Program 0 also stores the offset.

    offset = mean(absmax);  code = nearest dynamic code of (absmax - offset) / nested_absmax
    """
    # Every program adds all partial sums of the first kernel itself, in a fixed order. This needs neither a
    # third launch nor atomics. The accumulator is fp64.
    lane = tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK,), tl.float64)
    for start in range(0, programs, CHUNK):
        total += tl.load(sums + start + lane, mask=start + lane < programs, other=0.0).to(tl.float64)
    mean = (tl.sum(total, axis=0) * _SUM_SCALE / blocks).to(tl.float32)
    if tl.program_id(0) == 0:
        tl.store(offset, mean)

    # Tile (GROUP, NESTED_BLOCKSIZE). Positions past the end become 0, not -mean,
    # so they do not count for an absmax.
    row = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    block = row[:, None] * NESTED_BLOCKSIZE + tl.arange(0, NESTED_BLOCKSIZE)[None, :]
    mask = block < blocks
    values = tl.where(mask, tl.load(absmax + block, mask=mask, other=0.0) - mean, 0.0)
    largest = tl.max(tl.abs(values), axis=1)
    tl.store(nested_absmax + row, largest, mask=row * NESTED_BLOCKSIZE < blocks)
    scaled = values * _reciprocal(largest)[:, None]
    # Binary search over the 255 boundaries, one bit of the code at a time.
    found = tl.zeros_like(block)
    for power in tl.static_range(8):
        step = 128 >> power
        found += tl.where(scaled > tl.load(boundaries + found + (step - 1)), step, 0)
    tl.store(codes + block, found.to(tl.uint8), mask=mask)


def _quantize(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (packed, absmax, each program's partial sum of absmax)."""
    numel = weight.numel()
    weight = weight.contiguous()
    device = weight.device
    blocks = triton.cdiv(numel, blocksize)
    blocks_per_program = max(_VALUES_PER_PROGRAM // blocksize, 1)
    programs = triton.cdiv(blocks, blocks_per_program)
    packed = torch.empty(((numel + 1) // 2, 1), dtype=torch.uint8, device=device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=device)
    sums = torch.empty(programs, dtype=torch.float32, device=device)
    unit = unit_of(packed, numel)
    with torch.cuda.device_of(weight):
        _quantize_kernel[(programs,)](
            weight,
            cell_table(quant_type, device),
            packed,
            absmax,
            sums,
            numel,
            BLOCKSIZE=blocksize,
            BLOCKS=blocks_per_program,
            UNIT=unit,
            FP4=quant_type == "fp4",
            EVEN=numel % (blocks_per_program * blocksize) == 0,
            num_warps=_QUANTIZE_WARPS,
            enable_fp_fusion=False,
        )
    return packed, absmax, sums


def quantize_4bit(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Computes `halfbyte.kernels.quantize_4bit.reference.quantize_4bit` in one launch."""
    packed, absmax, _ = _quantize(weight, quant_type, blocksize)
    return packed, absmax


def quantize_4bit_double(
    weight: Tensor, quant_type: str, blocksize: int, nested_blocksize: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantizes a weight and its absmax in two launches; the second only reads the absmax.

    Returns (packed, codes, nested_absmax, offset). The offset is summed in another order than the reference's
    mean. So it equals it only to rounding (1e-6 relative), and a code next to a boundary may differ by one.
    """
    packed, absmax, sums = _quantize(weight, quant_type, blocksize)
    device = weight.device
    blocks = absmax.numel()
    rows = triton.cdiv(blocks, nested_blocksize)
    group = max(1024 // nested_blocksize, 1)
    codes = torch.empty(blocks, dtype=torch.uint8, device=device)
    nested_absmax = torch.empty(rows, dtype=torch.float32, device=device)
    offset = torch.empty((), dtype=torch.float32, device=device)
    with torch.cuda.device_of(weight):
        _quantize_absmax_kernel[(triton.cdiv(rows, group),)](
            absmax,
            sums,
            reference.on_device("DYNAMIC_BOUNDARIES", device),
            codes,
            nested_absmax,
            offset,
            blocks,
            sums.numel(),
            NESTED_BLOCKSIZE=nested_blocksize,
            GROUP=group,
            CHUNK=1024,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return packed, codes, nested_absmax, offset
