"""The 4-bit format on CPU in vectorized torch: the reference's results without a search per value.

Nothing is compiled. Looking up the two values of a byte together as one 64-bit word is as fast as
bitsandbytes' AVX-512 kernel, so `torch.compile` would only add many seconds of start-up.

The weight is processed in chunks that stay in the cache; every temporary has the size of a chunk.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.kernels.quantize_4bit import reference

_DEQUANTIZE_CHUNK = 1 << 20  # values
_QUANTIZE_CHUNK = 1 << 20

# Quantizing looks a scaled value's code up by its cell: the value times _CELLS, rounded to an integer. Cells
# are so small that almost none contains a boundary between codes.
_CELLS = 1 << 15  # per unit of the scaled value; a power of two, so that the product is exact
# Adding this to an fp32 value below 2**22 leaves round_half_even(value) + _CELLS in the low mantissa bits.
_ROUND_TO_BITS = 1.5 * 2**23 + _CELLS
_CELL_BITS = (1 << 17) - 1  # mask for cells up to 2 * _CELLS; also keeps the cell of a NaN within the table
_UNDECIDED = 0xFF  # table entry of a cell that contains a boundary: such values are searched


@functools.lru_cache(maxsize=16)
def _pairs(code: bytes) -> Tensor:
    """Returns (256,) int64: for every packed byte its two fp32 values, adjacent in memory.

    code: the bytes of the table (16,) fp32. A small layer would spend a fifth of its time on building the pairs.
    """
    table = torch.frombuffer(bytearray(code), dtype=torch.float32)
    byte = torch.arange(256)
    return torch.stack([table[byte >> 4], table[byte & 0xF]], dim=1).contiguous().view(torch.int64).view(-1)


def _chunk(limit: int, blocksize: int) -> int:
    """Returns the size of the largest even number of whole blocks within `limit` values, at least two."""
    return max(limit // (2 * blocksize), 1) * 2 * blocksize


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, code: Tensor, shape: Sequence[int], dtype: torch.dtype, blocksize: int
) -> Tensor:
    """Computes `halfbyte.kernels.quantize_4bit.reference.dequantize_4bit`, bitwise identical."""
    out = torch.empty(list(shape), dtype=dtype)
    flat_out = out.view(-1)
    flat = packed.reshape(-1)
    numel = flat_out.numel()
    chunk = min(_chunk(_DEQUANTIZE_CHUNK, blocksize), numel + numel % 2)
    pairs = _pairs(code.numpy().tobytes())
    # Buffers for one chunk, reused by all: bytes as indices, and the looked-up pairs. Pairs of fp32 are the result
    # itself.
    index = torch.empty(chunk // 2, dtype=torch.int32)
    in_place = dtype == torch.float32 and numel % 2 == 0
    gathered = flat_out.view(torch.int64) if in_place else torch.empty(chunk // 2, dtype=torch.int64)
    for start in range(0, numel, chunk):
        count = min(chunk, numel - start)
        size = (count + 1) // 2
        index[:size].copy_(flat[start // 2 : start // 2 + size])
        into = gathered[start // 2 : start // 2 + size] if in_place else gathered[:size]
        torch.index_select(pairs, 0, index[:size], out=into)
        values = into.view(torch.float32)[:count]  # a view: each int64 is two fp32 values
        # Multiply whole blocks with their absmax in place, then the last short block, if any.
        full = count // blocksize
        first = start // blocksize
        values[: full * blocksize].view(full, blocksize).mul_(absmax[first : first + full, None])
        if full * blocksize < count:
            values[full * blocksize :].mul_(absmax[first + full])
        if not in_place:
            flat_out[start : start + count].copy_(values)
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
    """Dequantizes a double-quantized weight, bitwise identical to the reference."""
    absmax = _dequantize_absmax(codes, nested_absmax, offset, nested_code, nested_blocksize)
    return dequantize_4bit(packed, absmax, code, shape, dtype, blocksize)


def _dequantize_absmax(
    codes: Tensor, nested_absmax: Tensor, offset: Tensor, nested_code: Tensor, nested_blocksize: int
) -> Tensor:
    """Computes the reference's `dequantize_absmax`, bitwise identical, without one scale per value in memory."""
    absmax = torch.index_select(nested_code, 0, codes.int())
    full = absmax.numel() // nested_blocksize
    blocks = absmax[: full * nested_blocksize].view(full, nested_blocksize)
    blocks.mul_(nested_absmax[:full, None])
    if full < nested_absmax.numel():  # a short last block
        absmax[full * nested_blocksize :].mul_(nested_absmax[full])
    return absmax.add_(offset)


@functools.cache
def _code_table(quant_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (code of each cell, boundaries, code of each interval between boundaries); FP4 by magnitude.

    Cells that contain a boundary hold `_UNDECIDED`.
    """
    if quant_type == "nf4":
        boundaries, ranked = reference.NF4_BOUNDARIES, torch.arange(16, dtype=torch.uint8)
    else:
        boundaries = reference.FP4_BOUNDARIES
        ranked = reference.FP4_CODE[:8].argsort().to(torch.uint8)
    cells = (boundaries * _CELLS + _ROUND_TO_BITS).view(torch.int32) & _CELL_BITS
    table = ranked[torch.bucketize(torch.arange(_CELL_BITS + 1, dtype=torch.int32), cells)]
    table[cells.long()] = _UNDECIDED
    return table, boundaries, ranked


def quantize_4bit(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Computes `halfbyte.kernels.quantize_4bit.reference.quantize_4bit` with identical codes."""
    flat = weight.reshape(-1)
    numel = flat.numel()
    packed = torch.empty(((numel + 1) // 2, 1), dtype=torch.uint8)
    absmax = torch.empty((numel + blocksize - 1) // blocksize)
    chunk = _chunk(_QUANTIZE_CHUNK, blocksize)
    for start in range(0, numel, chunk):
        values = flat[start : start + chunk].float()
        # Padding with zeros does not change a block's absmax and fills the last byte.
        values = torch.nn.functional.pad(values, (0, -values.numel() % (2 * blocksize))).view(-1, blocksize)
        first = start // blocksize
        largest = values.abs().amax(dim=1)
        absmax[first : first + largest.numel()] = largest[: absmax.numel() - first]
        scaled = values.mul_(largest.clamp_(min=1e-38).reciprocal_()[:, None]).view(-1)
        codes = _codes(scaled, quant_type).view(-1, 2)
        place = packed[start // 2 : (start + chunk) // 2].view(-1)
        torch.bitwise_or(codes[: place.numel(), 0] << 4, codes[: place.numel(), 1], out=place)
    return packed, absmax


def _codes(scaled: Tensor, quant_type: str) -> Tensor:
    """Returns the codes (n,) uint8 of values (n,) fp32 in [-1, 1]."""
    table, boundaries, ranked = _code_table(quant_type)
    magnitude = scaled.abs() if quant_type == "fp4" else scaled
    cell = (magnitude * _CELLS).add_(_ROUND_TO_BITS).view(torch.int32).bitwise_and_(_CELL_BITS)
    codes = torch.index_select(table, 0, cell)
    # Search only the few values whose cell contains a boundary.
    undecided = (codes == _UNDECIDED).nonzero().view(-1)
    codes[undecided] = ranked[torch.bucketize(magnitude[undecided], boundaries)]
    if quant_type == "fp4":
        codes.bitwise_or_((scaled < 0).to(torch.uint8) << 3)
    return codes


def quantize_4bit_double(
    weight: Tensor, quant_type: str, blocksize: int, nested_blocksize: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (packed, codes, nested_absmax, offset), equal to the reference's."""
    packed, absmax = quantize_4bit(weight, quant_type, blocksize)
    return packed, *reference.quantize_absmax(absmax, nested_blocksize)
