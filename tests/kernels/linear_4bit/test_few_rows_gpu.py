"""Checks the CUDA kernel of the 4-bit linear for 2 to 16 rows: exact weights and fp32 sums."""

import itertools

import pytest
import torch

from halfbyte.kernels.linear_4bit import ops as linear_ops
from halfbyte.kernels.quantize_4bit import reference
from halfbyte.kernels.quantize_4bit.packed_weight import PackedWeight

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from halfbyte.kernels.linear_4bit import cuda_few_rows, cuda_one_row

from tensors import relative_error

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills memory with NaN and frees it. Outputs reuse this memory, so unwritten values show as NaN."""
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 22):
        torch.full((size,), float("nan"), device="cuda")


def quantized_weight(shape, *, double=True, quant_type="nf4", blocksize=64):
    weight = torch.randn(shape, device="cuda") * 0.02
    packed, absmax = reference.quantize_4bit(weight, quant_type, blocksize)
    code = reference.CODES[quant_type].cuda()
    if not double:
        return PackedWeight(packed, absmax, None, None, code, None, shape, blocksize, 256)
    nested = reference.quantize_absmax(absmax, 256)
    return PackedWeight(packed, *nested, code, reference.DYNAMIC_CODE.cuda(), shape, blocksize, 256)


@pytest.mark.parametrize(
    ("shape", "rows", "double", "dtype"),
    itertools.product(
        ((3072, 3072), (264, 1088), (40, 64)),
        (1, 2, 8, 9, 16),
        (False, True),
        (torch.bfloat16, torch.float16),
    ),
)
def test_against_float64(shape, rows, double, dtype):
    weight = quantized_weight(shape, double=double)
    x = torch.randn(rows, shape[1], device="cuda").to(dtype)
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    exact = x.double() @ weight.dequantize(dtype).double().t()
    limit = {torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    assert cuda_few_rows.supports(weight, x) == (rows > 1)  # a single row works but is not the fastest way
    assert relative_error(cuda_few_rows.linear_rows(x, weight, None), exact) < limit
    assert relative_error(cuda_few_rows.linear_rows(x, weight, bias), exact + bias.double()) < limit


@pytest.mark.parametrize(
    ("quant_type", "double", "blocksize"), [("nf4", True, 64), ("fp4", False, 64), ("nf4", True, 256)]
)
def test_weights_are_bitwise_identical_to_dequantize(quant_type, double, blocksize):
    weight = quantized_weight((80, 1280), quant_type=quant_type, double=double, blocksize=blocksize)
    right = weight.dequantize(torch.bfloat16)
    for first in range(0, 1280, 16):
        picked = torch.zeros(16, 1280, device="cuda", dtype=torch.bfloat16)
        picked[range(16), range(first, first + 16)] = 1
        # Multiplying by one and adding zeros are exact.
        assert torch.equal(cuda_few_rows.linear_rows(picked, weight, None).t(), right[:, first : first + 16])


def test_it_is_bitwise_repeatable():
    weight = quantized_weight((3072, 3072))
    x = torch.randn(16, 3072, device="cuda", dtype=torch.bfloat16)
    first = cuda_few_rows.linear_rows(x, weight, None)
    assert all(torch.equal(first, cuda_few_rows.linear_rows(x, weight, None)) for _ in range(20))


def test_the_kernel_is_chosen_by_rows_and_weight():
    weight = quantized_weight((128, 512))
    x = torch.randn(16, 512, device="cuda", dtype=torch.bfloat16)
    assert linear_ops.few_rows_kernel(x, weight) is cuda_few_rows
    assert linear_ops.few_rows_kernel(x[:1], weight) is cuda_one_row
    assert linear_ops.few_rows_kernel(x[:3].float(), weight) is cuda_one_row
    assert linear_ops.few_rows_kernel(x.float(), weight) is None
    assert linear_ops.few_rows_kernel(torch.cat([x, x]), weight) is None
    assert linear_ops.few_rows_kernel(x, quantized_weight((128, 512), blocksize=32)) is None
    assert linear_ops.few_rows_kernel(x[:, :480].contiguous(), quantized_weight((128, 480))) is None
