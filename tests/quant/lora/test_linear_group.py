"""Tests LinearGroup and the stacking ops: outputs, gradients and layouts against float64."""

import pytest
import torch

from halfbyte.kernels.fp32_product import product_in_fp32
from halfbyte.kernels.stacked.ops import stack_downs, stack_ups
from halfbyte.quant.formats.nf4 import QuantSpec
from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.quant.lora.linear_group import GroupLayer, LinearGroup

GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
BOUND = {torch.float32: 2e-5, torch.bfloat16: 6e-3}


def group(device, dtype, *, packed=True, outputs=(96, 40, 200), width=128, ranks=(4, 0, 7), scale=1.5):
    generator = torch.Generator().manual_seed(3)
    layers = []
    for count, rank in zip(outputs, ranks, strict=True):
        weight = torch.randn(count, width, generator=generator) / width**0.5
        if packed:
            layer = Linear4bit(width, count, bias=False, spec=QuantSpec(), compute_dtype=dtype)
            layer.quantize(weight.to(device, torch.bfloat16), "test")
            weight_operand = layer.packed_weight()
        else:
            weight_operand = weight.to(device, dtype)
        down = torch.randn(rank, width, generator=generator).to(device) / width**0.5 if rank else None
        up = torch.randn(count, rank, generator=generator).to(device) if rank else None
        bias = torch.randn(count, generator=generator).to(device) if count != 40 else None
        layers.append(GroupLayer(weight_operand, bias, down, up, scale))
    return LinearGroup(tuple(layers))


def float64_reference(group, x, grad):
    """Computes y, dx, dA and dB in float64 with the same dequantized weights, with autograd."""
    x = x.double().requires_grad_()
    outputs, leaves = [], []
    for layer in group.layers:
        weight = (
            layer.weight
            if isinstance(layer.weight, torch.Tensor)
            else layer.weight.dequantize(dtype_of(grad))
        )
        y = x @ weight.double().t()
        if layer.bias is not None:
            y = y + layer.bias.double()
        if layer.rank:
            down, up = layer.down.double().requires_grad_(), layer.up.double().requires_grad_()
            y = y + layer.scale * (x @ down.t()) @ up.t()
            leaves += [down, up]
        outputs.append(y)
    y = torch.cat(outputs, dim=1)
    return y.detach(), torch.autograd.grad(y, [x, *leaves], grad.double())


def dtype_of(grad):
    return grad.dtype


def error(value, expected):
    return float((value.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_outputs_and_gradients_match_float64(device, dtype, packed):
    layers = group(device, dtype, packed=packed)
    rows = 37
    x = torch.randn(rows, layers.width, device=device).to(dtype)
    upstream = torch.randn(rows, layers.outputs, device=device).to(dtype)
    wide = layers.widened(rows, layers.width, x).fill_(float("nan"))
    wide[:, : layers.width] = x
    y = layers.forward(wide)
    grad = layers.widened(rows, layers.outputs, x).fill_(float("nan"))
    grad[:, : layers.outputs] = upstream
    dx, downs, ups = layers.gradients(grad, wide[:, : layers.width], layers.xa(wide), wants_input=True)
    learned = [part for pair in zip(downs, ups, strict=True) for part in pair if part is not None]
    expected_y, expected = float64_reference(layers, x, upstream)
    assert y.dtype == dx.dtype == dtype
    assert len(learned) == 4
    assert downs[1] is None
    assert ups[1] is None
    for value, wanted in zip([y, dx, *learned], [expected_y, *expected], strict=True):
        assert value.shape == wanted.shape
        assert error(value, wanted) < BOUND[dtype]
    assert all(part.dtype == torch.float32 for part in learned)


@pytest.mark.parametrize("device", DEVICES)
def test_group_without_adapters_has_no_extra_columns(device):
    layers = group(device, torch.bfloat16, ranks=(0, 0, 0))
    assert layers.extra == 0
    x = torch.randn(5, layers.width, device=device).bfloat16()
    grad = torch.randn(5, layers.outputs, device=device).bfloat16()
    y = layers.forward(x)
    dx, downs, ups = layers.gradients(grad, x, layers.xa(x), wants_input=True)
    expected_y, (expected,) = float64_reference(layers, x, grad)
    assert error(y, expected_y) < BOUND[torch.bfloat16]
    assert error(dx, expected) < BOUND[torch.bfloat16]
    assert downs == ups == [None] * 3


def test_input_gradient_is_computed_only_if_wanted():
    layers = group("cpu", torch.float32)
    x = layers.widened(5, layers.width, torch.empty(0)).normal_()
    layers.lift(x)
    grad = layers.widened(5, layers.outputs, x).normal_()
    dx, *_ = layers.gradients(grad, x[:, : layers.width], layers.xa(x), wants_input=False)
    assert dx is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ranks", [(4,), (4, 0, 7), (128, 16, 128, 16), (3, 1, 2, 2, 5)])
@pytest.mark.parametrize("device", DEVICES)
def test_stacked_adapters_have_the_expected_layout(device, ranks, dtype):
    outputs, width = [96, 40, 200, 64, 8][: len(ranks)], 1100
    extra, scales = sum(ranks) + 3, [1.0, 0.3, 2.0, 1.0, 0.7][: len(ranks)]
    downs = [torch.randn(rank, width, device=device) for rank in ranks if rank]
    learned = [number for number, rank in enumerate(ranks) if rank]
    ups = [torch.randn(outputs[number], ranks[number], device=device) for number in learned]
    starts = [sum(outputs[:number]) for number in learned]
    down = torch.full((extra, width), float("nan"), device=device, dtype=dtype)
    stack_downs(down, downs)
    assert torch.equal(down, torch.cat([*downs, torch.zeros(3, width, device=device)]).to(dtype))
    up = torch.full((sum(outputs), extra), float("nan"), device=device, dtype=dtype)
    stack_ups(up, ups, starts, [scales[number] for number in learned])
    blocks = [torch.zeros(count, 0, device=device) for count in outputs]
    for number, part in zip(learned, ups, strict=True):
        blocks[number] = part * scales[number]
    expected = torch.block_diag(*blocks) if learned else blocks[0]
    assert torch.equal(up[:, :-3], expected.to(dtype))
    assert not up[:, -3:].any()


def test_stacking_ops_pass_opcheck():
    downs = [torch.randn(3, 16), torch.randn(2, 16)]
    ups = [torch.randn(8, 3), torch.randn(4, 2)]
    torch.library.opcheck(torch.ops.halfbyte.stack_downs_.default, (torch.empty(8, 16), downs))
    torch.library.opcheck(
        torch.ops.halfbyte.stack_ups_.default, (torch.empty(20, 8), ups, [0, 8], [1.0, 0.5])
    )


@GPU
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_stacked_weights_are_bitwise_the_dequantized_weights(quant_type):
    from halfbyte.kernels.stacked.cuda_weight import stack_weight

    for outputs, width, rank, columns, double in (
        (96, 64, 3, 8, True),
        (333, 192, 16, 64, True),
        (40, 72, 8, 8, False),
    ):
        layer = Linear4bit(
            width,
            outputs,
            bias=False,
            spec=QuantSpec(quant_type=quant_type, double_quant=double),
            compute_dtype=torch.bfloat16,
        )
        layer.quantize(torch.randn(outputs, width, device="cuda").bfloat16(), "test")
        up = torch.randn(outputs, rank, device="cuda")
        out = torch.full((outputs, width + columns), float("nan"), device="cuda", dtype=torch.bfloat16)
        stack_weight(out, layer.packed_weight(), up, 0.5, 2, columns)
        assert torch.equal(out[:, :width], layer.packed_weight().dequantize(torch.bfloat16))
        expected = torch.zeros(outputs, columns, device="cuda", dtype=torch.bfloat16)
        kept = min(rank, columns - 2)
        expected[:, 2 : 2 + kept] = (up[:, :kept] * 0.5).bfloat16()
        assert torch.equal(out[:, width:], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gpu_products_are_summed_in_fp32(dtype):
    x = torch.randn(4608, 512, device="cuda").to(dtype)
    expected = x.double().t() @ x.double()
    product = product_in_fp32(x.t(), x)
    assert product.dtype == torch.float32
    # The measured error is 1.1e-5: the GPU sums in slightly less than fp32. A result rounded to 16 bits would have an
    # error of 2e-4 or more.
    assert ((product - expected).norm() / expected.norm()).item() < 4e-5
