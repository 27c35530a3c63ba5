"""Gluon kernel for a 4-bit linear of 2 to 16 rows: tensor cores on weights that are decoded in registers.

Decoding dominates the cost of such a product. So no value is decoded twice,
and no decoded value leaves its thread:

- A thread holds whole groups of 64 values that share a scale. They take only 16 different values, which are
  computed and rounded once, as dequantizing rounds them, and then looked up with byte permutations, four at a
  time (`halfbyte.kernels.linear_4bit.ptx_lookup`).
- The decoded registers already are a tensor core operand (a fragment). A sum over K may run in any order, so
  the kernel picks the order in which the decoded values fall into place. `_arrange_kernel` first brings x
  into the same order.

There is no shared memory and no barrier. The weights are bitwise identical to `dequantize`'s. Sums are fp32.
If N alone gives too few programs, K is split into parts whose sums `_sum_kernel` adds in a fixed order.

Gluon is Triton's language for kernels that control in which lane and register each value lies.

The order of K: a step covers 8 groups of 64 values in each weight row; a group has 8 words of 8 values, a
word 4 bytes of 2 values. One mma has K = 16: the two values of one byte of a word, for each of the 8 groups.
So a step takes 8 words * 4 bytes = 32 mmas, that is 32 * 16 = 512 values of K.
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

from halfbyte.kernels.linear_4bit import ptx_lookup
from halfbyte.kernels.quantize_4bit.cuda import launches_early
from halfbyte.kernels.quantize_4bit.packed_weight import PackedWeight
from halfbyte.kernels.triton_launch import Launcher

MAX_ROWS = 16

_GROUP = 64  # values of a weight row that share a scale
_STEP = 8 * _GROUP  # values of a weight row in one iteration

# Measured best on an H200 (docs/benchmarks/kernels.md).
_WARPS = 4
_WANTED_PROGRAMS = 864  # about two waves of three programs on each of an H200's 132 multiprocessors
_SUM_TILE = 1024


_TABLE_BF16 = tl.constexpr(ptx_lookup.build("bf16"))
_TABLE_FP16 = tl.constexpr(ptx_lookup.build("f16"))
_TABLE_OPERANDS = tl.constexpr(ptx_lookup.BUILD_OPERANDS)
_DECODE = tl.constexpr(ptx_lookup.decode())
_DECODE_OPERANDS = tl.constexpr(ptx_lookup.DECODE_OPERANDS)


@triton.jit(do_not_specialize=["rows"])
def _arrange_kernel(x, arranged, rows, width, ROWS: tl.constexpr, EARLY: tl.constexpr):
    """Copies x (rows, width) into the fragment order of `_product_kernel`. Grid: (steps,).

    arranged: (step, word of a group, g / 4, m / 8, m % 8, g % 4, value of a word), where g numbers the 8
    groups of a step and m the rows of x. Rows and columns past x are zero.
    """
    if EARLY:
        # Launched while the previous kernel still runs: do not read x before this.
        tl.extra.cuda.gdc_wait()
    # Decompose the flat output index into its coordinates, last dimension first.
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
    """Returns total (OUTPUTS, ROWS) plus the products of one word of every group: four mmas with K = 16.

    `word` (OUTPUTS, 8 groups) is packed; t0-t7 are the tables of the same (output, group). Each of the four
    mmas takes the two values of one byte of the word, for 8 groups.
    """
    OUTPUTS: gl.constexpr = total.shape[0]
    ROWS: gl.constexpr = total.shape[1]
    # Eight tensors (OUTPUTS, 8 groups): values[i] is value i of the word.
    values = gl.inline_asm_elementwise(
        _DECODE,
        _DECODE_OPERANDS,
        [word, t0, t1, t2, t3, t4, t5, t6, t7],
        dtype=(inputs.dtype,) * 8,
        is_pure=True,
        pack=1,
    )
    # Split the word's index of a value into byte (two bits) and parity within the byte. Then reorder (g / 4,
    # m / 8, m % 8, g % 4, byte high, byte low, parity) to (k, m, byte high, byte low), k = (g, parity). These
    # only rename registers: with `assert_trivial` the compiler refuses to move data between lanes.
    inputs = inputs.reshape((2, ROWS // 8, 8, 4, 2, 2, 2)).permute((0, 3, 6, 1, 2, 4, 5))
    low0, low1 = gl.split(inputs.reshape((16, ROWS, 2, 2)))
    x0, x2 = gl.split(low0)
    x1, x3 = gl.split(low1)
    xs = (x0, x1, x2, x3)
    for byte in gl.static_range(4):
        # k = (g, parity) here as well: joins both values of a byte as the last dimension.
        left = gl.join(values[2 * byte], values[2 * byte + 1]).reshape((OUTPUTS, 16))
        total = mma_v2(
            gl.convert_layout(left, LEFT, assert_trivial=True),
            gl.convert_layout(xs[byte], RIGHT, assert_trivial=True),
            total,
        )
    return total


# Not specialized on rows and steps, so that other counts do not compile the kernel again.
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
    """Computes out[part, m, n], the sum over one part of K. Grid: (n tiles, parts).

    A warp computes 16 outputs n for all rows m, over `steps` steps of K. With a single part (WHOLE) out is
    the final (m, n), with the bias. `groups` is the number of 64-value groups in a weight row.
    """
    IS_HALF: gl.constexpr = arranged.dtype.element_ty == gl.float16
    OUTPUTS: gl.constexpr = 16 * WARPS
    SUM: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], instr_shape=[16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUM, 2)
    packed = packed.to(gl.pointer_type(gl.int32))
    # The 16 code values, as scalars. They do not depend on the previous kernel,
    # so they are loaded before the wait.
    c0, c1, c2, c3 = gl.load(code), gl.load(code + 1), gl.load(code + 2), gl.load(code + 3)
    c4, c5, c6, c7 = gl.load(code + 4), gl.load(code + 5), gl.load(code + 6), gl.load(code + 7)
    c8, c9, c10, c11 = gl.load(code + 8), gl.load(code + 9), gl.load(code + 10), gl.load(code + 11)
    c12, c13, c14, c15 = gl.load(code + 12), gl.load(code + 13), gl.load(code + 14), gl.load(code + 15)

    tile = gl.program_id(0) * OUTPUTS
    # Indices and layout of the packed words: (output, group, word).
    output = (
        tile + gl.arange(0, OUTPUTS, gl.SliceLayout(1, gl.SliceLayout(2, WORD_LAYOUT)))[:, None][:, :, None]
    )
    group = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, WORD_LAYOUT)))[None, :][:, :, None]
    word = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, WORD_LAYOUT)))[None, :][:, None, :]
    word_place = (output * groups + group) * 8 + word
    # Indices and layout of the scales: (output, group).
    scale_output = tile + gl.arange(0, OUTPUTS, gl.SliceLayout(1, GROUP_LAYOUT))[:, None]
    scale_group = gl.arange(0, 8, gl.SliceLayout(0, GROUP_LAYOUT))[None, :]
    scale_place = scale_output * groups + scale_group
    fragment = gl.arange(0, 64 * ROWS, INPUT_LAYOUT)
    total = gl.zeros((OUTPUTS, ROWS), gl.float32, SUM)  # fp32 accumulator of the tensor cores
    if EARLY:
        # Gluon's form of gdc_wait: `arranged` comes from the previous kernel.
        gl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )
    shift = gl.load(offset) if DOUBLE else 0.0

    first = gl.program_id(1) * steps
    # Software pipeline: the words of the first step are loaded here, those of step i + 1 during step i.
    words = gl.load(
        packed + word_place + first * 64, mask=(output < outputs) & (first * 8 + group < groups), other=0
    )
    for step in range(first, first + steps):
        start = step * 8  # the step's first group
        known = (scale_output < outputs) & (start + scale_group < groups)
        block = (scale_place + start) // (BLOCKSIZE // 64)
        scale = gl.load(absmax + block, mask=known, other=0)
        if DOUBLE:
            nested = gl.load(nested_absmax + block // NESTED_BLOCKSIZE, mask=known, other=0.0)
            scale = gl.load(nested_code + scale.to(gl.int32)) * nested + shift
        # One table of 16 rounded values per (output, group), for all 64 values of the group.
        t0, t1, t2, t3, t4, t5, t6, t7 = gl.inline_asm_elementwise(
            _TABLE_FP16 if IS_HALF else _TABLE_BF16,
            _TABLE_OPERANDS,
            [scale, c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15],
            dtype=(gl.int32,) * 8,
            is_pure=True,
            pack=1,
        )
        # Take (output, group, word) apart into eight (output, group) tensors, by
        # the three bits of the word's number.
        even, odd = gl.split(words.reshape((OUTPUTS, 8, 2, 2, 2)))
        even0, even1 = gl.split(even)
        odd0, odd1 = gl.split(odd)
        w0, w4 = gl.split(even0)
        w2, w6 = gl.split(even1)
        w1, w5 = gl.split(odd0)
        w3, w7 = gl.split(odd1)
        each = (w0, w1, w2, w3, w4, w5, w6, w7)
        # The current words are in w0-w7 now; start loading the next step's while these are multiplied.
        words = gl.load(
            packed + word_place + start * 8 + 64,
            mask=(output < outputs) & (start + 8 + group < groups) & (step + 1 < first + steps),
            other=0,
        )
        for number in gl.static_range(8):
            # The word's part of x is contiguous in `arranged`: 8 groups * ROWS rows * 8 values.
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
    """Computes out = sum over the parts + bias, over flat (m, n). The loop fixes the order of additions."""
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
    """Returns the layouts of words (n, group, word), scales (n, group) and flat inputs that match mma's fragments.

    Of the 16 x 16 weight fragment (PTX ISA, mma.m16n8k16) the thread with r = lane // 4 and t = lane % 4
    holds rows r and r + 8, and columns 2t, 2t + 1, 2t + 8 and 2t + 9. A column k is (group, parity), so the
    thread holds groups t and t + 4 with both parities. A layout lists basis vectors: which index each bit of
    the register, lane and warp number adds.
    """
    tiles = [16 << bit for bit in range(warps.bit_length() - 1)]
    # Registers: the 8 words of a group, rows r and r + 8, groups t and t + 4.
    # Lanes: t, then r. Warps: 16 rows each.
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
    # Registers: the 8 values of a word (one 16-byte load), then g / 4, then m /
    # 8 for 16 rows. Every warp loads all.
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
    """Returns True if the device runs this PTX: mma with K = 16 needs compute capability 8.0."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def supports(weight: PackedWeight, x: Tensor) -> bool:
    """Returns True if this kernel should multiply these rows x (M, K).

    A weight row must consist of whole blocks, and a block of whole groups of 64. The kernel also multiplies a
    single row correctly, but `halfbyte.kernels.linear_4bit.cuda_one_row` is a tenth faster there.
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
    """The split of a product over programs."""

    rows: int  # of the inputs, padded to 8 or 16
    warps: int  # per program, each with 16 outputs
    parts: int  # of K
    steps: int  # per part
    early: bool  # launch while the previous kernel still runs


@functools.cache
def _plan(rows: int, outputs: int, width: int, device: torch.device) -> _Plan:
    all_steps = triton.cdiv(width, _STEP)
    steps = max(all_steps * triton.cdiv(outputs, 16 * _WARPS) // _WANTED_PROGRAMS, 1)
    parts = triton.cdiv(all_steps, steps)
    return _Plan(8 if rows <= 8 else 16, _WARPS, parts, steps, launches_early(device))


def linear_rows(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Returns x (M, K) times the 4-bit weight (N, K) transposed, plus bias (N,): (M, N) in x's dtype.

    `supports` must be True for weight and x.
    """
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
    # Three launches at most, on one stream: arrange x, multiply, add the parts.
    # `arranged` and `partial` are free after.
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
    addend = y if bias is None else bias  # without a bias y is only a placeholder, never read
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
