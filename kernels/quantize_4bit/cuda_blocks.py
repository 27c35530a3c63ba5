"""Building blocks for the 4-bit Triton kernels: units of packed values, absmax of blocks, table lookups."""

import triton
import triton.language as tl
from torch import Tensor

# Values that a thread takes at a time (a unit): those of a 32-bit word, or those of one byte if the number of
# values or the address is not aligned.
_WORD_UNIT = 8
_BYTE_UNIT = 2


def unit_of(packed: Tensor, numel: int) -> int:
    """Returns how many values a thread may take at a time from this packed weight: 8 or 2."""
    return _WORD_UNIT if numel % _WORD_UNIT == 0 and packed.data_ptr() % 4 == 0 else _BYTE_UNIT


@triton.jit
def unit_pointer(packed, UNIT: tl.constexpr):
    """Returns the address of packed bytes as a pointer to units: int32 words, or bytes unchanged."""
    if UNIT == 8:
        units = packed.to(tl.pointer_type(tl.int32))
    else:
        units = packed
    return units


@triton.jit
def in_range(position, left, EVEN: tl.constexpr):
    """Returns the mask `position < left`, or with EVEN (always true) a constant that the compiler removes."""
    if EVEN:
        mask = tl.full(position.shape, 1, tl.int1)
    else:
        mask = position < left
    return mask


@triton.jit
def lookup(table, SIZE: tl.constexpr, index):
    """Returns table[index] for an index (rows, columns), with a gather from shared memory.

    This takes half the instructions of a load from global memory.
    """
    ROWS: tl.constexpr = index.shape[0]
    COLUMNS: tl.constexpr = index.shape[1]
    found = tl.gather(tl.load(table + tl.arange(0, SIZE)), tl.reshape(index, (ROWS * COLUMNS,)), 0)
    return tl.reshape(found, (ROWS, COLUMNS))


@triton.jit
def read_scale(
    scale,
    nested_absmax,
    offset,
    nested_code,
    block,
    mask,
    NESTED_BLOCKSIZE: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """Returns the fp32 absmax of the blocks `block` from the stored `scale` (with DOUBLE a uint8 code).

    absmax = nested_code[code] * nested_absmax + offset, with product and sum rounded separately.
    """
    if DOUBLE:
        nested = tl.load(nested_absmax + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        scale = tl.load(nested_code + scale.to(tl.int32)) * nested + tl.load(offset)
    return scale


@triton.jit
def block_scale(
    absmax,
    nested_absmax,
    offset,
    nested_code,
    block,
    mask,
    NESTED_BLOCKSIZE: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """Loads the fp32 absmax of the blocks `block`."""
    scale = tl.load(absmax + block, mask=mask, other=0)
    return read_scale(scale, nested_absmax, offset, nested_code, block, mask, NESTED_BLOCKSIZE, DOUBLE)
