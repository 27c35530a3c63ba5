"""Triton kernel for a 4-bit linear of one to four rows, which never writes the weight dequantized.

Modulation and embedding layers see one row per sample and hold over a quarter of FLUX's parameters. Their
products only have to read the packed bytes, a quarter of the bf16 weight's. The kernel is limited not by
memory but by looking up every value for every row. It is the fastest kernel for one row; for up to `MAX_ROWS`
rows it is used if `halfbyte.kernels.linear_4bit.cuda_few_rows` does not support the weight.

The products are fp32: x times table value, summed over a word, times the block's scale. Unlike dequantizing,
this does not round the weight to x's dtype in between.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.quantize_4bit.cuda_blocks import block_scale, in_range, unit_pointer
from halfbyte.kernels.quantize_4bit.packed_weight import PackedWeight
from halfbyte.kernels.triton_launch import Launcher

MAX_ROWS = 4

_UNIT = tl.constexpr(8)  # values in a 32-bit word of the packed weight
_WORDS = 64  # of each weight row that a program reads at a time
_WANTED_PROGRAMS = 1024  # about eight on each of an H200's 132 multiprocessors


def supports(weight: PackedWeight, x: Tensor) -> bool:
    """Returns True if the kernel can multiply these rows x (M, K). A weight row must be whole blocks."""
    return (
        1 <= x.shape[0] <= MAX_ROWS
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and weight.shape[1] % weight.blocksize == 0
        and weight.blocksize <= _WORDS * _UNIT.value
        and weight.packed.data_ptr() % 4 == 0
    )


@triton.jit
def _linear_kernel(
    x,
    packed,
    absmax,
    nested_absmax,
    offset,
    code,
    nested_code,
    bias,
    out,
    outputs,
    width,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    DOUBLE: tl.constexpr,
    BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WORDS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Computes out[m, n] for OUTPUTS consecutive n and one m. Grid: (n tiles, M).

    y[n] = sum over words of scale[n, block of the word] * sum over the word's 8 values of x * code
    """
    packed = unit_pointer(packed, _UNIT)
    BLOCK_WORDS: tl.constexpr = BLOCKSIZE // _UNIT
    BLOCKS: tl.constexpr = WORDS // BLOCK_WORDS
    row_words = width // _UNIT
    first_row = tl.program_id(0) * OUTPUTS
    rows_left = outputs - first_row
    first_word = first_row.to(tl.int64) * row_words
    first_block = (first_word // BLOCK_WORDS).to(tl.int32)
    x += tl.program_id(1).to(tl.int64) * width
    table = tl.load(code + tl.arange(0, 16))
    # A step processes WORDS words of each of OUTPUTS weight rows, in one flat dimension with rows outermost.
    # A lane then holds the same word of every row, so all rows use the inputs it has loaded, and lanes
    # exchange nothing before the final sum.
    lane = tl.arange(0, WORDS)
    word = tl.arange(0, OUTPUTS * WORDS)
    block = tl.arange(0, OUTPUTS * BLOCKS)
    total = tl.zeros((OUTPUTS * WORDS,), tl.float32)  # fp32 accumulator, over all steps
    for start in range(0, row_words, WORDS):
        left = row_words - start
        words = tl.load(
            tl.max_contiguous(packed + first_word + start + word // WORDS * row_words + word % WORDS, [1]),
            mask=in_range(word // WORDS, rows_left, EVEN) & in_range(word % WORDS, left, EVEN),
            other=0,
        )
        scale = block_scale(
            absmax,
            nested_absmax,
            offset,
            nested_code,
            first_block + (start + block // BLOCKS * row_words) // BLOCK_WORDS + block % BLOCKS,
            in_range(block // BLOCKS, rows_left, EVEN) & in_range(block % BLOCKS * BLOCK_WORDS, left, EVEN),
            NESTED_BLOCKSIZE,
            DOUBLE,
        )
        # Within a step, sum x * code over the 8 values of each word, without the scale.
        products = tl.zeros((OUTPUTS * WORDS,), tl.float32)
        for within in tl.static_range(8):
            inputs = tl.load(
                x + (start + lane) * _UNIT + within, mask=in_range(lane, left, EVEN), other=0.0
            ).to(tl.float32)
            # The even value of a byte is its high nibble: shifts 4, 0, 12, 8, ...
            values = tl.gather(table, (words >> ((within ^ 1) * 4)) & 15, axis=0)
            shared = tl.broadcast_to(inputs[None, :], (OUTPUTS, WORDS))
            products += values * tl.reshape(shared, (OUTPUTS * WORDS,))
        # Apply the scale once per word instead of once per value.
        each_scale = tl.broadcast_to(scale[:, None], (OUTPUTS * BLOCKS, BLOCK_WORDS))
        total += products * tl.reshape(each_scale, (OUTPUTS * WORDS,))
    y = tl.sum(tl.reshape(total, (OUTPUTS, WORDS)), axis=1)
    row = first_row + tl.arange(0, OUTPUTS)
    inside = row < outputs
    if BIAS:
        y += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    place = out + tl.program_id(1).to(tl.int64) * outputs + row
    tl.store(place, y.to(out.dtype.element_ty), mask=inside)


# Within a single warp tl.gather exchanges registers (shuffles) instead of
# using shared memory and its barriers.
_launch = Launcher(_linear_kernel, num_warps=1)


def linear_rows(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Returns x (M, K) times the weight (N, K) transposed, plus bias (N,): (M, N) in x's dtype.

    `supports` must be True for weight and x.
    """
    outputs, width = weight.shape
    x = x.contiguous()
    rows = x.shape[0]
    absmax = weight.absmax
    if weight.nested_absmax is None:
        nested = (absmax, absmax, absmax)  # never read
    else:
        assert weight.offset is not None
        assert weight.nested_code is not None
        nested = (weight.nested_absmax, weight.offset, weight.nested_code)
    # Fewer outputs per program where 8 would give too few programs to fill the GPU.
    per_program = 8
    while per_program > 2 and outputs * rows < _WANTED_PROGRAMS * per_program * 2:
        per_program //= 2
    y = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    even = outputs % per_program == 0 and width % (_WORDS * _UNIT.value) == 0
    double, has_bias = weight.nested_absmax is not None, bias is not None
    _launch(
        (triton.cdiv(outputs, per_program), rows, 1),
        (
            x,
            weight.packed,
            absmax,
            nested[0],
            nested[1],
            weight.code,
            nested[2],
            x if bias is None else bias,
            y,
            outputs,
            width,
        ),
        (weight.blocksize, weight.nested_blocksize, double, has_bias, per_program, _WORDS, even),
    )
    return y
