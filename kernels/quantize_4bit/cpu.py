"""The 4-bit format on CPU in vectorized torch: the reference's numbers, without its per-value searches.

Nothing here is compiled. Gathering two dequantized values a byte as one 64-bit word runs at the speed of
bitsandbytes' AVX-512 kernel, so a `torch.compile` path would only add its start-up of many seconds.

Work goes in chunks that stay in the cache; every temporary is a chunk's size, whatever the weight's.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.kernels.quantize_4bit import reference

_DEQUANTIZE_CHUNK = 1 << 20  # values
_QUANTIZE_CHUNK = 1 << 20

# Cells of the scaled value that `quantize` looks codes up by: fine enough that almost none holds a boundary.
_CELLS = 1 << 15  # a unit of the scaled value; a power of two, so that scaling by it is exact
# Added to a float32 below 2**22, this leaves round_half_even(value) + _CELLS in the low mantissa bits.
_ROUND_TO_BITS = 1.5 * 2**23 + _CELLS
_CELL_BITS = (1 << 17) - 1  # up to 2 * _CELLS, and a stray NaN stays inside the table
_UNDECIDED = 0xFF  # the entry of a cell that a boundary divides


def _pairs(code: Tensor) -> Tensor:
    """(256,) int64: the two fp32 values of every packed byte, side by side in memory."""
    byte = torch.arange(256)
    return torch.stack([code[byte >> 4], code[byte & 0xF]], dim=1).contiguous().view(torch.int64).view(-1)


def _chunk(limit: int, blocksize: int) -> int:
    """The largest even number of whole blocks within `limit`, at least two blocks."""
    return max(limit // (2 * blocksize), 1) * 2 * blocksize


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, code: Tensor, shape: Sequence[int], dtype: torch.dtype, blocksize: int
) -> Tensor:
    """`reference.dequantize_4bit`, bit for bit."""
    out = torch.empty(list(shape), dtype=dtype)
    flat_out = out.view(-1)
    flat = packed.reshape(-1)
    numel = flat_out.numel()
    chunk = min(_chunk(_DEQUANTIZE_CHUNK, blocksize), numel + numel % 2)
    pairs = _pairs(code)
    index = torch.empty(chunk // 2, dtype=torch.int32)
    gathered = torch.empty(chunk // 2, dtype=torch.int64)
    for start in range(0, numel, chunk):
        count = min(chunk, numel - start)
        size = (count + 1) // 2
        index[:size].copy_(flat[start // 2 : start // 2 + size])
        torch.index_select(pairs, 0, index[:size], out=gathered[:size])
        values = gathered[:size].view(torch.float32)[:count]
        full = count // blocksize
        first = start // blocksize
        values[: full * blocksize].view(full, blocksize).mul_(absmax[first : first + full, None])
        if full * blocksize < count:
            values[full * blocksize :].mul_(absmax[first + full])
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
    """The weight of a double-quantized layer, bit for bit as the reference has it."""
    absmax = reference.dequantize_absmax(codes, nested_absmax, offset, nested_code, nested_blocksize)
    return dequantize_4bit(packed, absmax, code, shape, dtype, blocksize)


@functools.cache
def _code_table(quant_type: str) -> tuple[Tensor, Tensor, Tensor]:
    """(code of every cell, boundaries, code of every rank between them); for FP4 by magnitude, without sign."""
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
    """`reference.quantize_4bit`, code for code."""
    flat = weight.reshape(-1)
    numel = flat.numel()
    packed = torch.empty(((numel + 1) // 2, 1), dtype=torch.uint8)
    absmax = torch.empty((numel + blocksize - 1) // blocksize)
    chunk = _chunk(_QUANTIZE_CHUNK, blocksize)
    for start in range(0, numel, chunk):
        values = flat[start : start + chunk].float()
        # Zeros at the end neither raise a block's absmax nor leave a byte half written.
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
    """(n,) fp32 in [-1, 1] -> (n,) uint8 codes."""
    table, boundaries, ranked = _code_table(quant_type)
    magnitude = scaled.abs() if quant_type == "fp4" else scaled
    cell = (magnitude * _CELLS).add_(_ROUND_TO_BITS).view(torch.int32).bitwise_and_(_CELL_BITS)
    codes = torch.index_select(table, 0, cell)
    undecided = (codes == _UNDECIDED).nonzero().view(-1)
    codes[undecided] = ranked[torch.bucketize(magnitude[undecided], boundaries)]
    if quant_type == "fp4":
        codes.bitwise_or_((scaled < 0).to(torch.uint8) << 3)
    return codes


def quantize_4bit_double(
    weight: Tensor, quant_type: str, blocksize: int, nested_blocksize: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(packed, codes, nested_absmax, offset), equal to the reference's."""
    packed, absmax = quantize_4bit(weight, quant_type, blocksize)
    return packed, *reference.quantize_absmax(absmax, nested_blocksize)
