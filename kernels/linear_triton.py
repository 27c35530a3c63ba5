"""A 4-bit linear for a few rows on CUDA: the packed weight is read once and never written out dequantized.

With M rows the bytes are those of the packed weight alone, a quarter of bf16's, so the floor is packed bytes over
memory bandwidth. One row multiplies in fp32, the block's scale applied to sums of eight products; more rows go
through the tensor cores, with the weight rounded to the rows' dtype as `dequantize_4bit` rounds it. Above
`MAX_ROWS`, dequantizing and cuBLAS is faster.

Sums over parts of the reduction are added in a fixed order, never by atomics: a run must repeat to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.nf4_triton import block_scale, check_blocksize, lookup
from halfbyte.kernels.packed_weight import PackedWeight

MAX_ROWS = 16

_UNIT = tl.constexpr(8)  # values in a 32-bit word of the packed weight
_DOT_ROWS = 16  # the tensor cores' smallest tile

# One row: output rows a program computes, and words of each it reads at a time. In a single warp the table is
# looked up by exchanging registers, without the barriers that shared memory needs.
_ROW_OUTPUTS = 8
_ROW_WORDS = 32
_ROW_WARPS = 1
# Several rows: the weight tile of a step, in output rows and words.
_TILE_OUTPUTS = 32
_TILE_WORDS = 16
_TILE_WARPS = 4
_WANTED_PROGRAMS = 512  # about four on each of an H200's 132 multiprocessors


def supports(weight: PackedWeight, rows: int, dtype: torch.dtype) -> bool:
    """Whether these kernels can multiply `rows` rows of `dtype` by this weight."""
    return (
        1 <= rows <= MAX_ROWS
        and dtype in (torch.bfloat16, torch.float16, torch.float32)
        and weight.shape[1] % _UNIT.value == 0  # a word must not cross into the next row
        and weight.packed.data_ptr() % 4 == 0
    )


@triton.jit
def _nibbles(words):
    """(rows, columns) words -> (rows, columns * 8) table indices, in the order of the values."""
    ROWS: tl.constexpr = words.shape[0]
    COLUMNS: tl.constexpr = words.shape[1]
    shift = (tl.arange(0, _UNIT) ^ 1) * 4
    return tl.reshape((words[:, :, None] >> shift[None, None, :]) & 15, (ROWS, COLUMNS * _UNIT))


@triton.jit
def _one_row_kernel(
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
):
    row_words = width // _UNIT
    lane = tl.arange(0, WORDS)
    table = tl.load(code + tl.arange(0, 16))
    # All of a step's words in one dimension, rows outermost: thread t holds word t of every row, so that the rows
    # share its inputs and nothing is exchanged before the last sum.
    each = tl.arange(0, OUTPUTS * WORDS)
    each_row = tl.program_id(0) * OUTPUTS + each // WORDS
    total = tl.zeros((OUTPUTS * WORDS,), tl.float32)
    for start in range(0, row_words, WORDS):
        word = start + each % WORDS
        mask = (each_row < outputs) & (word < row_words)
        position = each_row.to(tl.int64) * row_words + word
        words = tl.load(tl.max_contiguous(packed + position, [1]), mask=mask, other=0)
        block = (position * _UNIT // BLOCKSIZE).to(tl.int32)
        scale = block_scale(absmax, nested_absmax, offset, nested_code, block, mask, NESTED_BLOCKSIZE, DOUBLE)
        products = tl.zeros((OUTPUTS * WORDS,), tl.float32)
        for within in tl.static_range(8):
            inputs = tl.load(x + (start + lane) * _UNIT + within, mask=start + lane < row_words, other=0.0)
            inputs = tl.broadcast_to(inputs.to(tl.float32)[None, :], (OUTPUTS, WORDS))
            values = tl.gather(table, (words >> ((within ^ 1) * 4)) & 15, axis=0)
            products += values * tl.reshape(inputs, (OUTPUTS * WORDS,))
        total += products * scale
    row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    y = tl.sum(tl.reshape(total, (OUTPUTS, WORDS)), axis=1)
    if BIAS:
        y += tl.load(bias + row, mask=row < outputs, other=0.0).to(tl.float32)
    tl.store(out + row, y.to(out.dtype.element_ty), mask=row < outputs)


@triton.jit
def _weight_tile(
    packed,
    absmax,
    nested_absmax,
    offset,
    code,
    nested_code,
    row,
    word,
    outputs,
    row_words,
    dtype: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """W[row, word * 8 : word * 8 + 8] for every row and word, in `dtype`; zeros outside."""
    ROWS: tl.constexpr = row.shape[0]
    WORDS: tl.constexpr = word.shape[0]
    mask = (row < outputs)[:, None] & (word < row_words)[None, :]
    position = row.to(tl.int64)[:, None] * row_words + word[None, :]
    words = tl.load(packed + position, mask=mask, other=0)
    block = (position * _UNIT // BLOCKSIZE).to(tl.int32)
    scale = block_scale(absmax, nested_absmax, offset, nested_code, block, mask, NESTED_BLOCKSIZE, DOUBLE)
    # A masked word's scale is not zero under double quantization, where the offset alone remains.
    scale = tl.where(mask, scale, 0.0)
    values = tl.reshape(lookup(code, 16, _nibbles(words)), (ROWS, WORDS, _UNIT)) * scale[:, :, None]
    return tl.reshape(values, (ROWS, WORDS * _UNIT)).to(dtype)


@triton.jit
def _rows_kernel(
    x,
    packed,
    absmax,
    nested_absmax,
    offset,
    code,
    nested_code,
    partial,
    rows,
    outputs,
    width,
    words_per_part,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """partial[part, m, n] = sum over the part's k of x[m, k] W[n, k]; grid (n tiles, parts)."""
    m = tl.arange(0, ROWS)
    row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row_words = width // _UNIT
    first = tl.program_id(1) * words_per_part
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(first, min(first + words_per_part, row_words), WORDS):
        weight = _weight_tile(
            packed,
            absmax,
            nested_absmax,
            offset,
            code,
            nested_code,
            row,
            start + tl.arange(0, WORDS),
            outputs,
            row_words,
            x.dtype.element_ty,
            BLOCKSIZE,
            NESTED_BLOCKSIZE,
            DOUBLE,
        )
        k = start * _UNIT + tl.arange(0, WORDS * _UNIT)
        mask = (m < rows)[:, None] & (k < width)[None, :]
        inputs = tl.load(x + m[:, None] * width + k[None, :], mask=mask, other=0.0)
        total = tl.dot(inputs, tl.trans(weight), total, input_precision="ieee")
    place = (tl.program_id(1) * rows + m)[:, None] * outputs + row[None, :]
    tl.store(partial + place, total, mask=(m < rows)[:, None] & (row < outputs)[None, :])


@triton.jit
def _input_grad_kernel(
    grad,
    packed,
    absmax,
    nested_absmax,
    offset,
    code,
    nested_code,
    partial,
    rows,
    outputs,
    width,
    outputs_per_part,
    BLOCKSIZE: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """partial[part, m, k] = sum over the part's n of grad[m, n] W[n, k]; grid (k tiles, parts)."""
    m = tl.arange(0, ROWS)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    k = tl.program_id(0) * (WORDS * _UNIT) + tl.arange(0, WORDS * _UNIT)
    first = tl.program_id(1) * outputs_per_part
    total = tl.zeros((ROWS, WORDS * _UNIT), tl.float32)
    for start in range(first, min(first + outputs_per_part, outputs), OUTPUTS):
        row = start + tl.arange(0, OUTPUTS)
        weight = _weight_tile(
            packed,
            absmax,
            nested_absmax,
            offset,
            code,
            nested_code,
            row,
            word,
            outputs,
            width // _UNIT,
            grad.dtype.element_ty,
            BLOCKSIZE,
            NESTED_BLOCKSIZE,
            DOUBLE,
        )
        mask = (m < rows)[:, None] & (row < outputs)[None, :]
        inputs = tl.load(grad + m[:, None] * outputs + row[None, :], mask=mask, other=0.0)
        total = tl.dot(inputs, weight, total, input_precision="ieee")
    place = (tl.program_id(1) * rows + m)[:, None] * width + k[None, :]
    tl.store(partial + place, total, mask=(m < rows)[:, None] & (k < width)[None, :])


def _weight_arguments(weight: PackedWeight) -> tuple[Tensor, ...]:
    absmax = weight.absmax
    if weight.nested_absmax is None:
        nested = (absmax, absmax, absmax)  # never read
    else:
        assert weight.offset is not None
        assert weight.nested_code is not None
        nested = (weight.nested_absmax, weight.offset, weight.nested_code)
    return (weight.packed.reshape(-1).view(torch.int32), absmax, nested[0], nested[1], weight.code, nested[2])


def _part_length(tiles: int, length: int, step: int) -> int:
    """How much of a reduction of `length` one program takes, so that `tiles` tiles fill the device."""
    parts = max(1, min(_WANTED_PROGRAMS // tiles, triton.cdiv(length, step)))
    return triton.cdiv(triton.cdiv(length, parts), step) * step


def linear_rows(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x (M, K) times the weight (N, K) transposed, plus bias (N,): (M, N) in x's dtype; see `supports`."""
    check_blocksize(weight.blocksize)
    outputs, width = weight.shape
    x = x.contiguous()
    rows = x.shape[0]
    double = weight.nested_absmax is not None
    with torch.cuda.device_of(x):
        if rows == 1:
            y = torch.empty((1, outputs), dtype=x.dtype, device=x.device)
            _one_row_kernel[(triton.cdiv(outputs, _ROW_OUTPUTS),)](
                x,
                *_weight_arguments(weight),
                x if bias is None else bias,
                y,
                outputs,
                width,
                BLOCKSIZE=weight.blocksize,
                NESTED_BLOCKSIZE=weight.nested_blocksize,
                DOUBLE=double,
                BIAS=bias is not None,
                OUTPUTS=_ROW_OUTPUTS,
                WORDS=_ROW_WORDS,
                num_warps=_ROW_WARPS,
            )
            return y
        tiles = triton.cdiv(outputs, _TILE_OUTPUTS)
        part = _part_length(tiles, width // _UNIT.value, _TILE_WORDS)
        parts = triton.cdiv(width // _UNIT.value, part)
        partial = torch.empty((parts, rows, outputs), dtype=torch.float32, device=x.device)
        _rows_kernel[(tiles, parts)](
            x,
            *_weight_arguments(weight),
            partial,
            rows,
            outputs,
            width,
            part,
            BLOCKSIZE=weight.blocksize,
            NESTED_BLOCKSIZE=weight.nested_blocksize,
            DOUBLE=double,
            ROWS=_DOT_ROWS,
            OUTPUTS=_TILE_OUTPUTS,
            WORDS=_TILE_WORDS,
            num_warps=_TILE_WARPS,
            enable_fp_fusion=False,
        )
    y = partial[0] if parts == 1 else partial.sum(dim=0)
    return (y if bias is None else y + bias).to(x.dtype)


def input_grad_rows(grad: Tensor, weight: PackedWeight) -> Tensor:
    """grad (M, N) times the weight (N, K): (M, K) in grad's dtype; see `supports`."""
    check_blocksize(weight.blocksize)
    outputs, width = weight.shape
    grad = grad.contiguous()
    rows = grad.shape[0]
    tiles = triton.cdiv(width // _UNIT.value, _TILE_WORDS)
    part = _part_length(tiles, outputs, _TILE_OUTPUTS)
    parts = triton.cdiv(outputs, part)
    partial = torch.empty((parts, rows, width), dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        _input_grad_kernel[(tiles, parts)](
            grad,
            *_weight_arguments(weight),
            partial,
            rows,
            outputs,
            width,
            part,
            BLOCKSIZE=weight.blocksize,
            NESTED_BLOCKSIZE=weight.nested_blocksize,
            DOUBLE=weight.nested_absmax is not None,
            ROWS=_DOT_ROWS,
            OUTPUTS=_TILE_OUTPUTS,
            WORDS=_TILE_WORDS,
            num_warps=_TILE_WARPS,
            enable_fp_fusion=False,
        )
    return (partial[0] if parts == 1 else partial.sum(dim=0)).to(grad.dtype)
