"""What the CUDA kernels of the 4-bit format share: units of packed values, block scales, table lookups."""

import triton
import triton.language as tl
from torch import Tensor

# Values a thread takes at a time: a 32-bit word's worth, or one byte's where the length or the address is odd.
_WORD_UNIT = 8
_BYTE_UNIT = 2


def unit_of(packed: Tensor, numel: int) -> int:
    """How many values a thread may take at a time from this packed weight."""
    return _WORD_UNIT if numel % _WORD_UNIT == 0 and packed.data_ptr() % 4 == 0 else _BYTE_UNIT


@triton.jit
def unit_pointer(packed, UNIT: tl.constexpr):
    """The address of packed bytes as one of units: int32 words or the bytes themselves."""
    if UNIT == 8:
        units = packed.to(tl.pointer_type(tl.int32))
    else:
        units = packed
    return units


@triton.jit
def in_range(position, left, EVEN: tl.constexpr):
    """The mask `position < left`; a constant, which the compiler drops, where the caller knows it holds."""
    if EVEN:
        mask = tl.full(position.shape, 1, tl.int1)
    else:
        mask = position < left
    return mask


@triton.jit
def lookup(table, SIZE: tl.constexpr, index):
    """table[index] for a (rows, columns) index, out of shared memory: half the instructions of a global load."""
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
    """The fp32 scales of the blocks numbered `block`, from what their absmax holds: with double quantization codes."""
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
    """The fp32 scales of the blocks numbered `block`."""
    scale = tl.load(absmax + block, mask=mask, other=0)
    return read_scale(scale, nested_absmax, offset, nested_code, block, mask, NESTED_BLOCKSIZE, DOUBLE)
