"""Checks that the ops refuse operands of the wrong type, size or layout, by name, before they read them."""

import pytest
import torch

from halfbyte.kernels.int8 import ops as int8_ops
from halfbyte.kernels.int8 import reference as int8_reference
from halfbyte.kernels.linear_4bit import accumulate_ops
from halfbyte.kernels.linear_4bit import ops as linear_ops
from halfbyte.kernels.quantize_4bit import ops, reference
from halfbyte.kernels.quantize_4bit.packed_weight import PackedWeight

SHAPE = (6, 50)  # 300 values in 5 blocks, 150 bytes
WEIGHT = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def fields(double):
    """Returns the fields of a `PackedWeight` by name."""
    if double:
        packed, codes, nested_absmax, offset = ops.quantize_4bit_double(WEIGHT, "nf4", 64, 256)
        nested = (codes, nested_absmax, offset, reference.NF4_CODE, reference.DYNAMIC_CODE)
    else:
        packed, absmax = ops.quantize_4bit(WEIGHT, "nf4", 64)
        nested = (absmax, None, None, reference.NF4_CODE, None)
    return PackedWeight(packed, *nested, SHAPE, 64, 256)._asdict()


def every_other(tensor):
    """Returns the same values with a stride of 2."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


# Name of a case -> (field, how it is damaged, pattern of the error); for
# a weight without double quantization.
DAMAGE = {
    "one byte": ("packed", lambda t: t[:1], r"packed: got torch.uint8 \(1, 1\) on cpu, expected .*150"),
    "a byte more": ("packed", lambda t: torch.cat([t, t[:1]]), r"packed: got torch.uint8 \(151, 1\)"),
    "int8 bytes": ("packed", lambda t: t.view(torch.int8), "packed: got torch.int8"),
    "spread bytes": ("packed", every_other, r"packed: .* with strides \(2, 2\)"),
    "one scale": ("absmax", lambda t: t[:1], r"absmax: got torch.\w+ \(1,\) on cpu, expected .*5 "),
    "half scales": ("absmax", lambda t: t.half(), "absmax: got torch.float16"),
    "spread scales": ("absmax", every_other, r"absmax: .* with strides \(2,\)"),
    "a short table": ("code", lambda t: t[:15], r"code: got torch.float32 \(15,\)"),
    "another shape": ("shape", lambda s: (6, 52), "packed: .*, expected .*156"),
    "an empty shape": ("shape", lambda s: (0, 50), r"shape: got \(0, 50\)"),
    "no block size": ("blocksize", lambda b: 0, "blocksize: got 0, .*32, 64"),
    "an odd block size": ("blocksize", lambda b: 48, "blocksize: got 48"),
}
NESTED_DAMAGE = {
    "no nested scale": ("nested_absmax", lambda t: t[:0], r"nested_absmax: got torch.float32 \(0,\)"),
    "two offsets": ("offset", lambda t: t.expand(2).clone(), r"offset: got torch.float32 \(2,\)"),
    "a double offset": ("offset", lambda t: t.double(), "offset: got torch.float64"),
    "a short nested table": ("nested_code", lambda t: t[:255], r"nested_code: got torch.float32 \(255,\)"),
    "no nested block size": ("nested_blocksize", lambda b: 0, "nested_blocksize: got 0"),
}
CASES = [(False, name) for name in DAMAGE] + [(True, name) for name in DAMAGE | NESTED_DAMAGE]


@pytest.mark.parametrize(("double", "name"), CASES)
def test_every_op_refuses_a_damaged_packed_weight(double, name):
    field, change, words = (DAMAGE | NESTED_DAMAGE)[name]
    whole = fields(double)
    weight = PackedWeight(**(whole | {field: change(whole[field])}))
    x, grad = torch.randn(2, 50), torch.randn(2, 6)
    dequantize = torch.ops.halfbyte.dequantize_4bit.default
    arguments = (weight.packed, weight.absmax, weight.code, weight.shape, torch.bfloat16, weight.blocksize)
    if double:
        dequantize = torch.ops.halfbyte.dequantize_4bit_double.default
        arguments = (*weight[:6], weight.shape, torch.bfloat16, weight.blocksize, weight.nested_blocksize)
    calls = [
        lambda: weight.dequantize(torch.bfloat16),
        lambda: dequantize(*arguments),
        lambda: linear_ops.linear_4bit(x, weight),
        lambda: linear_ops.linear_4bit(x.requires_grad_(), weight),
        lambda: linear_ops.linear_4bit_input_grad(grad, weight),
        lambda: accumulate_ops.add_linear_4bit(torch.zeros_like(grad), x.detach(), weight),
        lambda: accumulate_ops.add_linear_4bit_input_grad(torch.zeros(2, 50), grad, weight),
    ]
    if field == "shape":
        calls = calls[:2]  # the other calls would fail for x or grad first
    for call in calls:
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("name", ["one byte", "one scale", "no block size"])
def test_compiling_refuses_a_damaged_packed_weight(name):
    field, change, words = DAMAGE[name]
    whole = fields(False)
    weight = PackedWeight(**(whole | {field: change(whole[field])}))
    torch.compiler.reset()
    compiled = torch.compile(lambda: weight.dequantize(torch.bfloat16), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=words):
        compiled()


def test_symbolic_sizes_pass():
    def round_trip(weight):
        packed, absmax = ops.quantize_4bit(weight, "nf4", 64)
        return ops.dequantize_4bit(packed, absmax, reference.NF4_CODE, weight.shape, torch.float32, 64)

    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 9, 13):
        weight = torch.randn(rows, 50)
        assert torch.equal(compiled(weight), round_trip(weight))


@pytest.mark.parametrize(
    ("weight", "quant_type", "blocksizes", "words"),
    [
        (WEIGHT, "nf3", (64, 256), "quant_type: got 'nf3', .*nf4, fp4"),
        (WEIGHT, "nf4", (0, 256), "blocksize: got 0, .*32"),
        (WEIGHT, "nf4", (48, 256), "blocksize: got 48"),
        (WEIGHT.double(), "nf4", (64, 256), "weight: got torch.float64, .*torch.float32"),
        (WEIGHT[:0], "nf4", (64, 256), r"weight: got .*\(0, 50\)"),
    ],
)
def test_quantize_refuses_bad_weights(weight, quant_type, blocksizes, words):
    with pytest.raises(ValueError, match=words):
        ops.quantize_4bit(weight, quant_type, blocksizes[0])
    with pytest.raises(ValueError, match=words):
        ops.quantize_4bit_double(weight, quant_type, *blocksizes)
    with pytest.raises(ValueError, match="nested_blocksize: got 100"):
        ops.quantize_4bit_double(WEIGHT, "nf4", 64, 100)


def test_products_refuse_operands_that_do_not_fit():
    weight = PackedWeight(**fields(True))
    quantized, absmax = int8_reference.quantize_rows(WEIGHT)
    x, grad, bias = torch.randn(2, 50), torch.randn(2, 6), torch.randn(6)
    refused = {
        r"x: got shape \(100,\), .*\(\.\.\., 50\)": [
            lambda: linear_ops.linear_4bit(x.view(100), weight),
            lambda: int8_ops.linear_int8(x.view(100), quantized, absmax),
        ],
        r"x: got shape \(\)": [lambda: linear_ops.linear_4bit(x[0, 0], weight)],
        r"grad: got shape \(2, 50\), .*\(\.\.\., 6\)": [
            lambda: linear_ops.linear_4bit_input_grad(x, weight),
            lambda: int8_ops.linear_int8_input_grad(x, quantized, absmax),
        ],
        r"bias: got shape \(5,\) with strides \(1,\), .*\(6,\)": [
            lambda: linear_ops.linear_4bit(x, weight, bias[:5]),
            lambda: int8_ops.linear_int8(x, quantized, absmax, bias[:5]),
        ],
        r"bias: got shape \(6,\) with strides \(2,\)": [
            lambda: linear_ops.linear_4bit(x, weight, every_other(bias))
        ],
        r"out: got shape \(3, 6\), .*\(2, 6\) for x": [
            lambda: accumulate_ops.add_linear_4bit(torch.zeros(3, 6), x, weight)
        ],
        r"out: got shape \(2, 6\), .*\(2, 50\) for grad": [
            lambda: accumulate_ops.add_linear_4bit_input_grad(torch.zeros(2, 6), grad, weight)
        ],
        r"absmax: got torch.float32 \(5,\)": [
            lambda: int8_ops.linear_int8(x, quantized, absmax[:5]),
            lambda: int8_ops.linear_int8_input_grad(grad, quantized, absmax[:5]),
            lambda: int8_ops.dequantize_int8(quantized, absmax[:5], torch.bfloat16),
        ],
        "quantized: got torch.uint8": [
            lambda: int8_ops.dequantize_int8(quantized.view(torch.uint8), absmax, torch.bfloat16)
        ],
        r"weight: got torch.float32 \(50,\), .*\(N, K\)": [lambda: int8_ops.quantize_int8(WEIGHT[0])],
    }
    for words, calls in refused.items():
        for call in calls:
            with pytest.raises(ValueError, match=words):
                call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_operands_on_another_device_are_refused():
    weight = PackedWeight(**fields(True))
    on_cuda = [field.cuda() if isinstance(field, torch.Tensor) else field for field in weight]
    for number, name in ((1, "absmax"), (2, "nested_absmax"), (4, "code")):
        mixed = PackedWeight.of((*on_cuda[:number], weight[number], *on_cuda[number + 1 :]))
        for rows in (1, 40):  # the kernel for few rows, and dequantizing
            with pytest.raises(ValueError, match=f"{name}: .* on cpu"):
                linear_ops.linear_4bit(torch.randn(rows, 50, device="cuda"), mixed)
