"""Checks the CPU kernels against the reference, the reference against bitsandbytes, and runs opcheck."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.kernels.int8 import cpu as int8_cpu
from halfbyte.kernels.int8 import ops as int8_ops
from halfbyte.kernels.int8 import reference as int8_reference
from halfbyte.kernels.linear_4bit import ops as linear_ops
from halfbyte.kernels.quantize_4bit import cpu as cpu_4bit
from halfbyte.kernels.quantize_4bit import reference
from halfbyte.kernels.quantize_4bit.packed_weight import PackedWeight

from tensors import relative_error

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def random_weight(shape, dtype, seed):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight.view(-1)[:3] = 0
    return weight


def packed_weight(weight, double, quant_type="nf4", blocksize=64):
    """Returns the weight quantized by the reference, on CPU."""
    packed, absmax = reference.quantize_4bit(weight, quant_type, blocksize)
    code = reference.CODES[quant_type]
    if not double:
        return PackedWeight(packed, absmax, None, None, code, None, tuple(weight.shape), blocksize, 256)
    codes, nested_absmax, offset = reference.quantize_absmax(absmax, 256)
    return PackedWeight(
        packed,
        codes,
        nested_absmax,
        offset,
        code,
        reference.DYNAMIC_CODE,
        tuple(weight.shape),
        blocksize,
        256,
    )


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 90)),
    dtype=st.sampled_from(DTYPES),
    quant_type=st.sampled_from(("nf4", "fp4")),
    blocksize=st.sampled_from((32, 64, 128, 4096)),
    exponent=st.integers(-40, 4),
    seed=st.integers(0, 2**31),
)
def test_cpu_kernels_equal_the_reference(shape, dtype, quant_type, blocksize, exponent, seed):
    weight = random_weight(shape, torch.float32, seed).mul(2.0**exponent).to(dtype)
    expected = reference.quantize_4bit(weight, quant_type, blocksize)
    packed, absmax = cpu_4bit.quantize_4bit(weight, quant_type, blocksize)
    assert torch.equal(packed, expected[0])
    assert torch.equal(absmax, expected[1])
    code = reference.CODES[quant_type]
    for out in DTYPES:
        arguments = (packed, absmax, code, shape, out, blocksize)
        assert torch.equal(cpu_4bit.dequantize_4bit(*arguments), reference.dequantize_4bit(*arguments))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_cpu_kernels_equal_the_reference_over_many_chunks(quant_type, monkeypatch):
    monkeypatch.setattr(cpu_4bit, "_DEQUANTIZE_CHUNK", 256)
    monkeypatch.setattr(cpu_4bit, "_QUANTIZE_CHUNK", 256)
    weight = random_weight((61, 77), torch.bfloat16, 1)
    expected = reference.quantize_4bit(weight, quant_type, 64)
    nested = reference.quantize_absmax(expected[1], 256)
    double = cpu_4bit.quantize_4bit_double(weight, quant_type, 64, 256)
    for ours, theirs in zip(double, (expected[0], *nested), strict=True):
        assert torch.equal(ours, theirs)
    code = reference.CODES[quant_type]
    scale = reference.dequantize_absmax(*nested, reference.DYNAMIC_CODE, 256)
    out = cpu_4bit.dequantize_4bit_double(
        *double, code, reference.DYNAMIC_CODE, weight.shape, torch.bfloat16, 64, 256
    )
    assert torch.equal(
        out, reference.dequantize_4bit(double[0], scale, code, weight.shape, torch.bfloat16, 64)
    )


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_values_next_to_a_boundary_get_the_reference_code(quant_type):
    boundaries = {"nf4": reference.NF4_BOUNDARIES, "fp4": reference.FP4_BOUNDARIES}[quant_type]
    up, down = (torch.nextafter(boundaries, torch.full_like(boundaries, end)) for end in (2.0, -2.0))
    values = torch.cat([torch.ones(1), boundaries, up, down, -boundaries, -up, -down])
    values = torch.nn.functional.pad(values, (0, 128 - values.numel()))
    packed, _ = cpu_4bit.quantize_4bit(values, quant_type, 128)
    assert torch.equal(packed, reference.quantize_4bit(values, quant_type, 128)[0])


def test_cpu_quantize_equals_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(192, 320, generator=torch.Generator().manual_seed(5)).bfloat16() * 0.02
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    ours = cpu_4bit.quantize_4bit(weight, "nf4", 64)
    assert torch.equal(ours[0], packed)
    assert torch.equal(ours[1], state.absmax)
    out = cpu_4bit.dequantize_4bit(packed, state.absmax, state.code, weight.shape, torch.bfloat16, 64)
    assert torch.equal(out, functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize(("double", "rows"), itertools.product([False, True], [(1,), (2, 3)]))
def test_linear_4bit_against_float64(double, rows):
    weight = random_weight((24, 72), torch.float32, 7)
    quantized = packed_weight(weight, double)
    exact = quantized.dequantize(torch.float32).double()
    x = torch.randn(*rows, 72, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    y = linear_ops.linear_4bit(x, quantized, bias)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert relative_error(y, x.detach().double() @ exact.t() + bias.detach().double()) < 1e-6
    assert relative_error(x.grad, grad.double() @ exact) < 1e-6
    assert relative_error(bias.grad, grad.double().flatten(end_dim=-2).sum(0)) < 1e-6


@pytest.mark.parametrize("double", [False, True])
def test_linear_4bit_opcheck_and_fullgraph(double):
    quantized = packed_weight(random_weight((16, 64), torch.float32, 3), double)
    x = torch.randn(2, 3, 64, requires_grad=True)
    bias = torch.randn(16, requires_grad=True)
    torch.library.opcheck(torch.ops.halfbyte.linear_4bit.default, (x, bias, *quantized))
    grad = torch.randn(2, 3, 16)
    torch.library.opcheck(torch.ops.halfbyte.linear_4bit_input_grad.default, (grad, *quantized))

    def run(x):
        return torch.utils.checkpoint.checkpoint(
            lambda x: linear_ops.linear_4bit(x, quantized, bias).sin(), x, use_reentrant=False
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(x).sum(), x)
    (expected,) = torch.autograd.grad(run(x).sum(), x)
    assert torch.equal(ours, expected)


def test_int8_rows_against_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(9)).half() * 0.02
    quantized, absmax = int8_reference.quantize_rows(weight)
    theirs, their_absmax, _ = functional.int8_vectorwise_quant(weight.clone())
    assert torch.equal(absmax, their_absmax)
    difference = (quantized.int() - theirs.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 1e-4


def test_int8_rows_of_zeros_stay_zeros():
    quantized, absmax = int8_reference.quantize_rows(torch.zeros(2, 5))
    assert not quantized.any()
    assert not absmax.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_int8_propagates_nonfinite_values(value):
    quantized, absmax = int8_reference.quantize_rows(random_weight((8, 64), torch.float32, 1))
    x = torch.randn(3, 64)
    x[1, 5] = value
    y = int8_ops.linear_int8(x, quantized, absmax, None, 0.0)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
    codes, row_absmax = int8_reference.quantize_rows(x)
    assert not codes[1].any()
    assert not row_absmax[1].isfinite()


def outlying_input(rows, width):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(4))
    x[0, 3], x[-1, 10] = 40.0, -7.0
    return x


def test_outlier_columns_are_multiplied_exactly():
    weight = random_weight((48, 96), torch.float32, 2)
    quantized, absmax = int8_reference.quantize_rows(weight)
    x = outlying_input(6, 96)
    exact = x.double() @ weight.double().t()
    errors = {
        t: relative_error(int8_ops.linear_int8(x, quantized, absmax, None, t), exact) for t in (0.0, 6.0)
    }
    assert errors[6.0] < 0.015  # int8 by rows: 0.0087 for the weight, and as much for the input
    assert errors[0.0] > 2 * errors[6.0]
    rows, _, columns = int8_reference.quantize_activations(x, 6.0)
    assert columns.tolist() == [3, 10]
    assert not rows[:, columns].any()


def test_linear_int8_against_bitsandbytes():
    functions = pytest.importorskip("bitsandbytes.autograd._functions")
    weight = random_weight((40, 128), torch.float16, 6)
    quantized, absmax = int8_reference.quantize_rows(weight)
    x = outlying_input(5, 128).half()
    state = functions.MatmulLtState()
    state.CB, state.SCB, state.threshold, state.has_fp16_weights = quantized, absmax, 6.0, False
    theirs = functions.MatMul8bitLt.apply(x, quantized, None, None, state)
    ours = int8_ops.linear_int8(x, quantized, absmax, None, 6.0)
    assert relative_error(ours, theirs.double()) < 1e-3


@settings(max_examples=80, deadline=None)
@given(
    rows=st.sampled_from((0, 1, 2, 3, 16, 17, 33)),
    width=st.sampled_from((1, 2, 3, 7, 31, 64, 77, 200, 1000)),
    outputs=st.sampled_from((1, 2, 5, 8, 33, 64)),
    kind=st.sampled_from(("random", "largest", "alternating")),
    seed=st.integers(0, 2**31),
)
def test_the_int8_product_on_cpu_is_exact(rows, width, outputs, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randint(-128, 128, (count, width), dtype=torch.int8, generator=generator)
        for count in (rows, outputs)
    )
    if kind == "largest":
        a, b = a.fill_(127), b.fill_(-128)
    elif kind == "alternating":  # sums of pairs overflow 16 bits in both directions
        a, b = (torch.where(side > 0, 127, -128).to(torch.int8) for side in (a, b))
    assert torch.equal(int8_cpu.multiply(a, b), int8_reference.multiply(a, b))


@pytest.mark.parametrize("threshold", [0.0, 4.0])
@pytest.mark.parametrize(("rows", "width"), [(0, 64), (1, 1), (5, 1), (6, 77), (33, 1000)])
def test_linear_int8_on_cpu_equals_the_reference(rows, width, threshold):
    quantized, absmax = int8_reference.quantize_rows(random_weight((24, width + 2), torch.float32, 5)[:, 2:])
    x = 2 * torch.randn(rows, width)
    for dtype in DTYPES:
        arguments = (x.to(dtype), quantized, absmax, torch.randn(24).to(dtype), threshold)
        expected = int8_reference.linear_int8(*arguments)
        assert torch.equal(int8_ops.linear_int8(*arguments), expected)


def test_linear_int8_compiles_in_one_graph():
    quantized, absmax = int8_reference.quantize_rows(random_weight((24, 77), torch.float32, 5))
    x = torch.randn(6, 77).bfloat16()
    compiled = torch.compile(int8_ops.linear_int8, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, quantized, absmax), int8_ops.linear_int8(x, quantized, absmax))


_WITHOUT_VNNI = """
import torch
from halfbyte.kernels.int8 import cpu, reference
a, b = torch.full((64, 300), 127, dtype=torch.int8), torch.full((64, 300), -128, dtype=torch.int8)
expected = reference.multiply(a, b)
assert torch.equal(cpu.multiply(a, b), expected)
print(torch.equal(torch._int_mm(a, b.t()), expected), cpu.multiplies_exactly())
"""


def test_the_int8_product_is_exact_without_vnni_as_well():
    # Intel processors without VNNI saturate in oneDNN's int8 product, others may not. Whichever this one does, the
    # process must find it out, and its own product must be exact.
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    result = subprocess.run(
        [sys.executable, "-c", _WITHOUT_VNNI], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    torch_is_exact, found_exact = result.stdout.split()
    assert found_exact == torch_is_exact


def test_int8_of_a_transposed_weight_is_contiguous():
    weight = torch.randn(10, 6).t()
    quantized, _ = int8_ops.quantize_int8(weight)
    assert quantized.is_contiguous()
    assert torch.equal(quantized, int8_reference.quantize_rows(weight.contiguous())[0])
    torch.library.opcheck(torch.ops.halfbyte.quantize_int8.default, (weight,))


@pytest.mark.parametrize("rows", [(), (0,), (2, 3)])
def test_any_number_of_row_dimensions_with_a_trained_bias(rows):
    weight = random_weight((16, 64), torch.float32, 3)
    x, grad = torch.randn(*rows, 64), torch.randn(*rows, 16)
    products = {
        torch.ops.halfbyte.linear_4bit.default: packed_weight(weight, True),
        torch.ops.halfbyte.linear_int8.default: (*int8_reference.quantize_rows(weight), 6.0),
    }
    for op, fields in products.items():
        bias = torch.randn(16, requires_grad=True)
        if op is torch.ops.halfbyte.linear_4bit.default:
            arguments = (x.clone().requires_grad_(), bias, *fields)
        else:
            arguments = (x.clone().requires_grad_(), *fields[:2], bias, fields[2])
        op(*arguments).backward(grad)
        torch.testing.assert_close(bias.grad, grad.reshape(-1, 16).sum(0))
        torch.library.opcheck(op, arguments)


def test_linear_int8_gradients_and_opcheck():
    quantized, absmax = int8_reference.quantize_rows(random_weight((16, 32), torch.float32, 8))
    x = outlying_input(6, 32).view(2, 3, 32).requires_grad_()
    bias = torch.randn(16, requires_grad=True)
    y = int8_ops.linear_int8(x, quantized, absmax, bias, 6.0)
    grad = torch.randn_like(y)
    y.backward(grad)
    exact = quantized.double() * absmax.double()[:, None] / 127
    assert relative_error(x.grad, grad.double() @ exact) < 1e-6
    assert relative_error(bias.grad, grad.double().sum((0, 1))) < 1e-6
    torch.library.opcheck(
        torch.ops.halfbyte.linear_int8.default, (x.detach().requires_grad_(), quantized, absmax, bias, 6.0)
    )
    torch.library.opcheck(torch.ops.halfbyte.linear_int8_input_grad.default, (grad, quantized, absmax))
    torch.library.opcheck(torch.ops.halfbyte.quantize_int8.default, (torch.randn(3, 8),))
    torch.library.opcheck(torch.ops.halfbyte.dequantize_int8.default, (quantized, absmax, torch.bfloat16))
