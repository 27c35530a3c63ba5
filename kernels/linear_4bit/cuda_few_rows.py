"""A 4-bit linear for 2 to 16 rows on CUDA: tensor cores on weights that are decoded in registers.

What such a product costs is decoding, so nothing is decoded twice and no decoded value leaves its thread. A thread
holds whole blocks: the 64 values that share a scale have 16 different ones, which are computed and rounded once,
as dequantizing rounds them, and looked up by byte permutations, four at a time. The registers that this gives
are already in the places where the matrix unit wants a fragment of the weight, because K may be summed in any order
that the inputs follow: these are laid out in fragments beforehand. There is no shared memory and no barrier.

In Gluon, Triton's language for kernels that place their values themselves. The weights are those of `dequantize` to
the bit; sums are fp32, over parts of K where N alone makes too few programs, added up in a fixed order.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from halfbyte.kernels.linear_4bit import ptx_lookup as register_table
from halfbyte.kernels.quantize_4bit.cuda import launches_early
from halfbyte.kernels.quantize_4bit.packed_weight import PackedWeight
from halfbyte.kernels.triton_launch import Launcher

MAX_ROWS = 16

# A step is eight groups of 64 values in each of a program's rows of the weight. A group has eight 32-bit words.
_GROUP = 64
_STEP = 8 * _GROUP

# Measured best on an H200 (docs/benchmarks/kernels.md).
_WARPS = 4
_WANTED_PROGRAMS = 864  # about two rounds of three on each of an H200's 132 multiprocessors
_SUM_TILE = 1024


_TABLE_BF16 = tl.constexpr(register_table.build("bf16"))
_TABLE_FP16 = tl.constexpr(register_table.build("f16"))
_TABLE_OPERANDS = tl.constexpr(register_table.BUILD_OPERANDS)
_DECODE = tl.constexpr(register_table.decode())
_DECODE_OPERANDS = tl.constexpr(register_table.DECODE_OPERANDS)


@triton.jit(do_not_specialize=["rows"])
def _arrange_kernel(x, arranged, rows, width, ROWS: tl.constexpr, EARLY: tl.constexpr):
    """x as the fragments of `_product_kernel`: (step, word of a group, g / 4, m / 8, m % 8, g % 4, value of a word).

    g numbers the groups of a step, m the rows; what is beyond x is zero. Grid: a program a step.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
    place = tl.arange(0, ROWS * 512)
    value, group_low, row_low = place % 8, place // 8 % 4, place // 32 % 8
    row = place // 256 % (ROWS // 8) * 8 + row_low
    rest = place // (32 * ROWS)
    group, word = group_low + rest % 2 * 4, rest // 2
    column = tl.program_id(0) * 512 + group * 64 + word * 8 + value
    values = tl.load(x + row * width + column, mask=(row < rows) & (column < width), other=0.0)
    tl.store(arranged + tl.program_id(0) * (ROWS * 512) + place, values)


@gluon.jit
def _multiply_word(
    total, word, t0, t1, t2, t3, t4, t5, t6, t7, inputs, LEFT: gl.constexpr, RIGHT: gl.constexpr
):
    """total plus the products of one word of every group: four fragments of 8 groups times the 2 values of a byte."""
    OUTPUTS: gl.constexpr = total.shape[0]
    ROWS: gl.constexpr = total.shape[1]
    values = gl.inline_asm_elementwise(
        _DECODE,
        _DECODE_OPERANDS,
        [word, t0, t1, t2, t3, t4, t5, t6, t7],
        dtype=(inputs.dtype,) * 8,
        is_pure=True,
        pack=1,
    )
    # (g / 4, m / 8, m % 8, g % 4, byte high, byte low, parity) -> (k, m, byte high, byte low), k = (g, parity)
    inputs = inputs.reshape((2, ROWS // 8, 8, 4, 2, 2, 2)).permute((0, 3, 6, 1, 2, 4, 5))
    low0, low1 = gl.split(inputs.reshape((16, ROWS, 2, 2)))
    x0, x2 = gl.split(low0)
    x1, x3 = gl.split(low1)
    xs = (x0, x1, x2, x3)
    for byte in gl.static_range(4):
        left = gl.join(values[2 * byte], values[2 * byte + 1]).reshape((OUTPUTS, 16))
        total = mma_v2(
            gl.convert_layout(left, LEFT, assert_trivial=True),
            gl.convert_layout(xs[byte], RIGHT, assert_trivial=True),
            total,
        )
    return total


# A number of rows or steps more is no reason to compile again.
@gluon.jit(do_not_specialize=["rows", "steps"])
def _product_kernel(
    arranged,
    packed,
    absmax,
    nested_absmax,
    offset,
    code,
    nested_code,
    bias,
    out,
    rows,
    outputs,
    groups,
    steps,
    BLOCKSIZE: gl.constexpr,
    NESTED_BLOCKSIZE: gl.constexpr,
    DOUBLE: gl.constexpr,
    BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    WHOLE: gl.constexpr,
    WARPS: gl.constexpr,
    WORD_LAYOUT: gl.constexpr,
    GROUP_LAYOUT: gl.constexpr,
    INPUT_LAYOUT: gl.constexpr,
    EARLY: gl.constexpr,
):
    """out[part, m, n] for 16 n a warp, over `steps` steps of K; with one part the finished (m, n). Grid (n, part)."""
    IS_HALF: gl.constexpr = arranged.dtype.element_ty == gl.float16
    OUTPUTS: gl.constexpr = 16 * WARPS
    SUM: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], instr_shape=[16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUM, 2)
    packed = packed.to(gl.pointer_type(gl.int32))
    c0, c1, c2, c3 = gl.load(code), gl.load(code + 1), gl.load(code + 2), gl.load(code + 3)
    c4, c5, c6, c7 = gl.load(code + 4), gl.load(code + 5), gl.load(code + 6), gl.load(code + 7)
    c8, c9, c10, c11 = gl.load(code + 8), gl.load(code + 9), gl.load(code + 10), gl.load(code + 11)
    c12, c13, c14, c15 = gl.load(code + 12), gl.load(code + 13), gl.load(code + 14), gl.load(code + 15)

    tile = gl.program_id(0) * OUTPUTS
    # (output, group, word)
    output = (
        tile + gl.arange(0, OUTPUTS, gl.SliceLayout(1, gl.SliceLayout(2, WORD_LAYOUT)))[:, None][:, :, None]
    )
    group = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, WORD_LAYOUT)))[None, :][:, :, None]
    word = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, WORD_LAYOUT)))[None, :][:, None, :]
    word_place = (output * groups + group) * 8 + word
    # (output, group)
    scale_output = tile + gl.arange(0, OUTPUTS, gl.SliceLayout(1, GROUP_LAYOUT))[:, None]
    scale_group = gl.arange(0, 8, gl.SliceLayout(0, GROUP_LAYOUT))[None, :]
    scale_place = scale_output * groups + scale_group
    fragment = gl.arange(0, 64 * ROWS, INPUT_LAYOUT)
    total = gl.zeros((OUTPUTS, ROWS), gl.float32, SUM)
    if EARLY:
        gl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
    shift = gl.load(offset) if DOUBLE else 0.0

    first = gl.program_id(1) * steps
    words = gl.load(
        packed + word_place + first * 64, mask=(output < outputs) & (first * 8 + group < groups), other=0
    )
    for step in range(first, first + steps):
        start = step * 8
        known = (scale_output < outputs) & (start + scale_group < groups)
        block = (scale_place + start) // (BLOCKSIZE // 64)
        scale = gl.load(absmax + block, mask=known, other=0)
        if DOUBLE:
            nested = gl.load(nested_absmax + block // NESTED_BLOCKSIZE, mask=known, other=0.0)
            scale = gl.load(nested_code + scale.to(gl.int32)) * nested + shift
        t0, t1, t2, t3, t4, t5, t6, t7 = gl.inline_asm_elementwise(
            _TABLE_FP16 if IS_HALF else _TABLE_BF16,
            _TABLE_OPERANDS,
            [scale, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15],
            dtype=(gl.int32,) * 8,
            is_pure=True,
            pack=1,
        )
        even, odd = gl.split(words.reshape((OUTPUTS, 8, 2, 2, 2)))
        even0, even1 = gl.split(even)
        odd0, odd1 = gl.split(odd)
        w0, w4 = gl.split(even0)
        w2, w6 = gl.split(even1)
        w1, w5 = gl.split(odd0)
        w3, w7 = gl.split(odd1)
        each = (w0, w1, w2, w3, w4, w5, w6, w7)
        words = gl.load(
            packed + word_place + start * 8 + 64,
            mask=(output < outputs) & (start + 8 + group < groups) & (step + 1 < first + steps),
            other=0,
        )
        for number in gl.static_range(8):
            inputs = gl.load(arranged + (step * 8 + number) * (64 * ROWS) + fragment)
            one = gl.convert_layout(each[number], GROUP_LAYOUT, assert_trivial=True)
            total = _multiply_word(total, one, t0, t1, t2, t3, t4, t5, t6, t7, inputs, LEFT, RIGHT)

    n = tile + gl.arange(0, OUTPUTS, gl.SliceLayout(1, SUM))[:, None]
    m = gl.arange(0, ROWS, gl.SliceLayout(0, SUM))[None, :]
    inside = (n < outputs) & (m < rows)
    if WHOLE and BIAS:
        total += gl.load(bias + n, mask=n < outputs, other=0.0).to(gl.float32)
    place = out + (gl.program_id(1) * rows + m) * outputs + n
    gl.store(place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_kernel(
    partial,
    bias,
    out,
    numel,
    outputs,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out = the sum over the parts, plus bias; all flat (m, n)."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = place < numel
    total = tl.zeros((TILE,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(partial + part * numel + place, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + place % outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


_launch_arrange = Launcher(_arrange_kernel)
_launch_product = Launcher(_product_kernel, enable_fp_fusion=False)
_launch_sum = Launcher(_sum_kernel)


@functools.cache
def _layouts(warps: int, rows: int) -> tuple[Any, Any, Any]:
    """Where the words (n, group, word), scales (n, group) and inputs (fragment) lie, as a fragment has its values.

    Of a 16 x 16 fragment a thread has rows g and g + 8, columns 2t, 2t + 1, 2t + 8 and 2t + 9, for g = lane // 4
    and t = lane % 4 (PTX, mma.m16n8k16). A column is a group and a parity, so it holds groups t and t + 4.
    """
    tiles = [16 << bit for bit in range(warps.bit_length() - 1)]
    words = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [8, 0, 0], [0, 4, 0]],
        [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[tile, 0, 0] for tile in tiles],
        [],
        [16 * warps, 8, 8],
    )
    groups = gl.DistributedLinearLayout(
        [[8, 0], [0, 4]],
        [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        [[tile, 0] for tile in tiles],
        [],
        [16 * warps, 8],
    )
    inputs = gl.DistributedLinearLayout(
        [[1], [2], [4], [256], [512]][: 4 + rows // 16],
        [[8], [16], [32], [64], [128]],
        [[0] for _ in tiles],
        [],
        [64 * rows],
    )
    return words, groups, inputs


@functools.cache
def _has_instructions(device: torch.device) -> bool:
    """Whether the device runs this PTX: fragments of 16 columns came with compute capability 8.0."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def supports(weight: PackedWeight, x: Tensor) -> bool:
    """Whether these rows x (M, K) are for this kernel: a weight row must be whole blocks of 64.

    It multiplies a single row as well, but `linear_triton` is a tenth faster there.
    """
    return (
        2 <= x.shape[0] <= MAX_ROWS
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.shape[1] % weight.blocksize == 0
        and weight.blocksize % _GROUP == 0
        and weight.packed.data_ptr() % 16 == 0
        and _has_instructions(x.device)
    )


class _Plan(NamedTuple):
    """How a product is spread over programs."""

    rows: int  # of the inputs, filled up to whole fragments
    warps: int  # of a program, each with 16 outputs
    parts: int  # of K
    steps: int  # of a part
    early: bool  # launched while the kernel before still runs


@functools.cache
def _plan(rows: int, outputs: int, width: int, device: torch.device) -> _Plan:
    all_steps = triton.cdiv(width, _STEP)
    steps = max(all_steps * triton.cdiv(outputs, 16 * _WARPS) // _WANTED_PROGRAMS, 1)
    parts = triton.cdiv(all_steps, steps)
    return _Plan(8 if rows <= 8 else 16, _WARPS, parts, steps, launches_early(device))


def linear_rows(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """x (M, K) times the 4-bit weight (N, K) transposed, plus bias (N,): (M, N) in x's dtype; see `supports`."""
    outputs, width = weight.shape
    rows = x.shape[0]
    plan = _plan(rows, outputs, width, x.device)
    absmax = weight.absmax
    if weight.nested_absmax is None:
        nested = (absmax, absmax, absmax)  # never read
    else:
        assert weight.offset is not None
        assert weight.nested_code is not None
        nested = (weight.nested_absmax, weight.offset, weight.nested_code)
    early = plan.early
    arranged = x.new_empty(plan.parts * plan.steps * _STEP * plan.rows)
    _launch_arrange(
        (plan.parts * plan.steps, 1, 1),
        (x.contiguous(), arranged, rows, width),
        (plan.rows, early),
        num_warps=8,
        launch_pdl=early,
    )
    y = x.new_empty((rows, outputs))
    whole = plan.parts == 1
    partial = y if whole else x.new_empty((plan.parts, rows, outputs), dtype=torch.float32)
    addend = y if bias is None else bias
    double, has_bias = weight.nested_absmax is not None, bias is not None
    _launch_product(
        (triton.cdiv(outputs, 16 * plan.warps), plan.parts, 1),
        (
            arranged,
            weight.packed,
            absmax,
            nested[0],
            nested[1],
            weight.code,
            nested[2],
            addend,
            partial,
            rows,
            outputs,
            width // _GROUP,
            plan.steps,
        ),
        (
            weight.blocksize,
            weight.nested_blocksize,
            double,
            has_bias,
            plan.rows,
            whole,
            plan.warps,
            *_layouts(plan.warps, plan.rows),
            early,
        ),
        num_warps=plan.warps,
        launch_pdl=early,
    )
    if not whole:
        numel = rows * outputs
        _launch_sum(
            (triton.cdiv(numel, _SUM_TILE), 1, 1),
            (partial, addend, y, numel, outputs),
            (plan.parts, has_bias, _SUM_TILE, early),
            num_warps=4,
            launch_pdl=early,
        )
    return y
