"""Checks the CUDA kernels against the reference, float64 and bitsandbytes, with poisoned memory."""

import itertools

import pytest
import torch

from halfbyte.kernels.int8 import reference as int8_reference
from halfbyte.kernels.linear_4bit import ops as linear_ops
from halfbyte.kernels.quantize_4bit import reference
from halfbyte.kernels.quantize_4bit.packed_weight import PackedWeight

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from halfbyte.kernels.int8 import cuda as int8_cuda
from halfbyte.kernels.linear_4bit import cuda_one_row
from halfbyte.kernels.quantize_4bit import cuda as cuda_4bit

from tensors import relative_error

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Whole programs; a short last program; an odd length; a single value; rows that are no multiple of a block.
SHAPES = ((256, 512), (33, 264), (7, 9), (1, 1), (130, 1000))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills memory with NaN and frees it. Outputs reuse this memory, so unwritten values show as NaN."""
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24):
        torch.full((size,), float("nan"), device="cuda")


def random_weight(shape, dtype):
    weight = (torch.randn(shape, device="cuda") * 0.02).to(dtype)
    weight.view(-1)[:3] = 0
    return weight


def quantized_weight(weight, double, quant_type="nf4", blocksize=64):
    packed, absmax = reference.quantize_4bit(weight, quant_type, blocksize)
    code = reference.CODES[quant_type].cuda()
    if not double:
        return PackedWeight(packed, absmax, None, None, code, None, tuple(weight.shape), blocksize, 256)
    nested = reference.quantize_absmax(absmax, 256)
    nested_code = reference.DYNAMIC_CODE.cuda()
    return PackedWeight(packed, *nested, code, nested_code, tuple(weight.shape), blocksize, 256)


@pytest.mark.parametrize(
    ("shape", "dtype", "quant_type", "blocksize"),
    itertools.product(SHAPES, DTYPES, ("nf4", "fp4"), (32, 64, 4096)),
)
def test_quantize_equals_the_reference(shape, dtype, quant_type, blocksize):
    weight = random_weight(shape, dtype)
    expected = reference.quantize_4bit(weight, quant_type, blocksize)
    packed, absmax = cuda_4bit.quantize_4bit(weight, quant_type, blocksize)
    assert torch.equal(packed, expected[0])
    assert torch.equal(absmax, expected[1])
    codes, nested_absmax, offset = reference.quantize_absmax(absmax, 256)
    double = cuda_4bit.quantize_4bit_double(weight, quant_type, blocksize, 256)
    assert torch.equal(double[0], packed)
    difference = (double[1].int() - codes.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 3e-3 or difference.sum() <= 1
    torch.testing.assert_close(double[3], offset, rtol=1e-6, atol=0)
    # nested_absmax is the largest |absmax - offset|. If that is small, an error
    # of the offset is relatively large.
    torch.testing.assert_close(double[2], nested_absmax, rtol=1e-6, atol=1e-6 * offset.item())


@pytest.mark.parametrize("exponent", [-130, -120, 100])
def test_tiny_and_huge_blocks_equal_the_reference(exponent):
    weight = (torch.randn(64, 64, device="cuda").double() * 2.0**exponent).to(torch.bfloat16)
    expected = reference.quantize_4bit(weight, "nf4", 64)
    packed, absmax = cuda_4bit.quantize_4bit(weight, "nf4", 64)
    assert torch.equal(absmax, expected[1])
    assert torch.equal(packed, expected[0])


@pytest.mark.parametrize("blocksize", [32, 4096])
def test_the_mean_of_huge_scales_stays_finite(blocksize):
    weight = torch.full((512, 1024), 3e38, device="cuda")
    *_, nested_absmax, offset = cuda_4bit.quantize_4bit_double(weight, "nf4", blocksize, 256)
    torch.testing.assert_close(offset.item(), 3e38, rtol=1e-6, atol=0)
    assert (nested_absmax < 1e-5 * 3e38).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "quant_type", "blocksize", "double"),
    itertools.product(SHAPES, DTYPES, ("nf4", "fp4"), (32, 64, 4096), (False, True)),
)
def test_dequantize_equals_the_reference(shape, dtype, quant_type, blocksize, double):
    weight = random_weight(shape, torch.float32)
    quantized = quantized_weight(weight, double, quant_type, blocksize)
    absmax = quantized.absmax
    if double:
        absmax = reference.dequantize_absmax(*quantized[1:4], quantized.nested_code, 256)
        out = cuda_4bit.dequantize_4bit_double(*quantized[:6], shape, dtype, blocksize, 256)
    else:
        out = cuda_4bit.dequantize_4bit(quantized.packed, absmax, quantized.code, shape, dtype, blocksize)
    expected = reference.dequantize_4bit(quantized.packed, absmax, quantized.code, shape, dtype, blocksize)
    assert torch.equal(out, expected)


def test_dequantize_takes_an_odd_address():
    weight = random_weight((64, 64), torch.float32)
    packed, absmax = reference.quantize_4bit(weight, "nf4", 64)
    moved = torch.empty(packed.numel() + 1, dtype=torch.uint8, device="cuda")[1:]
    moved.copy_(packed.view(-1))
    code = reference.NF4_CODE.cuda()
    out = cuda_4bit.dequantize_4bit(moved, absmax, code, (64, 64), torch.bfloat16, 64)
    assert torch.equal(out, reference.dequantize_4bit(packed, absmax, code, (64, 64), torch.bfloat16, 64))


def test_quantize_equals_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for dtype, quant_type in itertools.product(DTYPES, ("nf4", "fp4")):
        weight = random_weight((512, 1024), dtype)
        packed, state = functional.quantize_4bit(weight, quant_type=quant_type, compress_statistics=False)
        ours = cuda_4bit.quantize_4bit(weight, quant_type, 64)
        assert torch.equal(ours[1], state.absmax)
        # 16-bit ratios hit some of FP4's boundaries exactly; there bitsandbytes'
        # approximate reciprocal decides.
        allowed = 0 if quant_type == "nf4" else 1e-3
        assert (ours[0] != packed).float().mean().item() <= allowed, (dtype, quant_type)


@pytest.mark.parametrize(
    ("shape", "rows", "double", "dtype"),
    itertools.product(
        ((40, 256), (33, 264), (512, 3072), (5000, 576)), (1, 4, 5, 16, 17), (False, True), DTYPES
    ),
)
def test_linear_4bit_against_float64(shape, rows, double, dtype):
    quantized = quantized_weight(random_weight(shape, torch.float32), double)
    exact = quantized.dequantize(torch.float32).double()
    x = torch.randn(rows, shape[1], device="cuda").to(dtype).requires_grad_()
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    y = linear_ops.linear_4bit(x, quantized, bias)
    grad = torch.randn_like(y)
    y.backward(grad)
    limit = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 2e-6}[dtype]
    assert relative_error(y, x.detach().double() @ exact.t() + bias.double()) < limit
    assert relative_error(x.grad, grad.double() @ exact) < limit


def test_small_linear_is_bitwise_repeatable():
    quantized = quantized_weight(random_weight((3072, 3072), torch.float32), True)
    x = torch.randn(4, 3072, device="cuda", dtype=torch.bfloat16)
    first = cuda_one_row.linear_rows(x, quantized, None)
    assert all(torch.equal(first, cuda_one_row.linear_rows(x, quantized, None)) for _ in range(20))


@pytest.mark.parametrize(
    ("shape", "rows", "threshold", "dtype"),
    itertools.product(((40, 70), (512, 1024), (8, 20000)), (1, 5, 40), (0.0, 4.0), DTYPES),
)
def test_int8_equals_the_reference(shape, rows, threshold, dtype):
    weight = random_weight(shape, dtype)
    quantized, absmax = int8_cuda.quantize_rows(weight)
    expected = int8_reference.quantize_rows(weight)
    assert torch.equal(quantized, expected[0])
    assert torch.equal(absmax, expected[1])
    x = torch.randn(rows, shape[1], device="cuda").to(dtype)
    ours = int8_cuda.quantize_activations(x, threshold)
    for tensor, wanted in zip(ours, int8_reference.quantize_activations(x, threshold), strict=True):
        assert torch.equal(tensor, wanted)
    assert torch.equal(int8_cuda.multiply(ours[0], quantized), int8_reference.multiply(ours[0], quantized))
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    y = int8_cuda.linear_int8(x, quantized, absmax, bias, threshold)
    wanted = int8_reference.linear_int8(x, quantized, absmax, bias, threshold)
    limit = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    assert relative_error(y, wanted.double()) < limit


def test_int8_takes_more_than_65535_rows():
    quantized, absmax = int8_cuda.quantize_rows(random_weight((24, 32), torch.bfloat16))
    x = torch.randn(65_536 + 3, 32, device="cuda", dtype=torch.bfloat16)
    y = int8_cuda.linear_int8(x, quantized, absmax, None, 4.0)
    wanted = int8_reference.linear_int8(x, quantized, absmax, None, 4.0)
    assert relative_error(y, wanted.double()) < 4e-3
    assert relative_error(y[65_530:], wanted[65_530:].double()) < 4e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e5])
@pytest.mark.parametrize(("threshold", "width"), itertools.product((0.0, 4.0), (70, 20000)))
def test_int8_propagates_nonfinite_values_like_the_reference(value, threshold, width):
    quantized, absmax = int8_cuda.quantize_rows(random_weight((40, width), torch.bfloat16))
    x = torch.randn(20, width, device="cuda", dtype=torch.bfloat16)
    x[7, 5] = value  # rows are converted to fp16 first, where 1e5 is infinite
    ours = int8_cuda.quantize_activations(x, threshold)
    wanted = int8_reference.quantize_activations(x, threshold)
    for tensor, expected in zip(ours, wanted, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True)
    y = int8_cuda.linear_int8(x, quantized, absmax, None, threshold)
    expected = int8_reference.linear_int8(x, quantized, absmax, None, threshold)
    assert torch.equal(y.isfinite(), expected.isfinite())
    # An outlier column is multiplied in x's dtype. Any other nonfinite value makes its whole row NaN.
    outlier = threshold > 0 and value == value
    assert y[7].isnan().all() or outlier
    assert y[[0, 6, 8, 19]].isfinite().all()


def test_int8_rows_equal_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = random_weight((1024, 3072), torch.float16)
    theirs, their_absmax, _ = functional.int8_vectorwise_quant(weight)
    quantized, absmax = int8_cuda.quantize_rows(weight)
    assert torch.equal(absmax, their_absmax)
    difference = (quantized.int() - theirs.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 1e-4
