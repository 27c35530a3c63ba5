"""Tests the int8 layer: forward and backward against bitsandbytes, moves, casts and copies, and adapters."""

import copy
import pickle
from functools import partial

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from halfbyte.kernels.int8 import ops as int8_ops
from halfbyte.quant.formats.int8 import quantize
from halfbyte.quant.layers.linear8bit import Int8Params, Linear8bit

from tensors import noise as noise_in

noise = partial(noise_in, dtype=torch.bfloat16)


def with_outliers(*shape, dtype=torch.bfloat16):
    x = noise(*shape, dtype=dtype)
    x[..., 0, 7], x[..., -1, 40] = 9.0, -20.0
    return x


def layer_of(in_features=96, out_features=80, *, bias=True, compute_dtype=torch.bfloat16, seed=0, **options):
    torch.manual_seed(seed)
    linear = nn.Linear(in_features, out_features, bias).bfloat16()
    return Linear8bit.from_linear(linear, compute_dtype=compute_dtype, **options)


def stock_layer(layer, threshold):
    """Returns bitsandbytes' layer with the same weights, in eval mode: only then it computes LLM.int8() on the CPU."""
    stock = bnb.nn.Linear8bitLt(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        has_fp16_weights=False,
        threshold=threshold,
    )
    stock.weight = bnb.nn.Int8Params(
        layer.weight.data.clone(), requires_grad=False, CB=layer.weight.data.clone(), SCB=layer.weight.SCB
    )
    if layer.bias is not None:
        stock.bias.data = layer.bias.detach().clone()
    return stock.eval()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 6])
def test_forward_matches_bitsandbytes(threshold, bias, rows):
    layer = layer_of(bias=bias, threshold=threshold, compute_dtype=torch.float16).half()
    x = with_outliers(rows, 96, dtype=torch.float16)
    torch.testing.assert_close(layer(x), stock_layer(layer, threshold)(x), rtol=2e-3, atol=4e-3)


def test_outlier_columns_use_the_compute_dtype():
    layer = layer_of(bias=False, compute_dtype=torch.float32)
    x = torch.zeros(3, 96)
    x[0, 7], x[0, 40], x[1, 7], x[2, 40] = 9.013, 7.77, 0.0017, 6.0
    expected = x.double() @ layer.dequantize(torch.float64).T
    # A column with one outlier is computed in the compute dtype for every row, so the int8 product has only zeros.
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-7)
    layer.threshold = 0.0
    assert (layer(x).double() - expected).abs().max() > 1e-3


def test_outlier_threshold_reduces_the_error():
    x = with_outliers(8, 96, dtype=torch.float32)
    errors = {}
    for threshold in (0.0, 6.0):
        layer = layer_of(compute_dtype=torch.float32, threshold=threshold, bias=False)
        exact = x.double() @ layer.dequantize(torch.float64).T
        errors[threshold] = ((layer(x).double() - exact).norm() / exact.norm()).item()
    assert errors[6.0] < 0.02
    assert errors[0.0] > 1.5 * errors[6.0]


@pytest.mark.parametrize("shape", [(96,), (1, 96), (3, 5, 96), (0, 96)])
def test_forward_accepts_any_batch_shape(shape):
    layer, x = layer_of(), noise(*shape)
    output = layer(x)
    assert output.shape == (*shape[:-1], 80)
    assert torch.equal(output, layer(x.view(-1, 96)).view_as(output))


def test_output_has_the_inputs_dtype_or_autocasts():
    layer = layer_of(compute_dtype=torch.float32)
    x = noise(3, 96)
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), layer(x.float()).bfloat16())
    expected = layer_of(compute_dtype=torch.bfloat16)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x.float())
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)


@pytest.mark.parametrize("rows", [(), (4, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_match_autograd_in_float64(bias, rows):
    layer = layer_of(bias=bias, compute_dtype=torch.float32).float().requires_grad_(False)
    if bias:
        layer.bias.requires_grad_(True)
    x = noise(*rows, 96, dtype=torch.float32, requires_grad=True)
    upstream = noise(*rows, 80, dtype=torch.float32, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        output = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must have no effect on backward()
        output.backward(upstream)
    exact_x = x.detach().double().requires_grad_(True)
    exact_bias = layer.bias.detach().double().requires_grad_(True) if bias else None
    nn.functional.linear(exact_x, layer.dequantize(torch.float64), exact_bias).backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-5, atol=1e-5)
    if bias:
        torch.testing.assert_close(layer.bias.grad.double(), exact_bias.grad, rtol=1e-5, atol=1e-5)
    assert layer.weight.grad is None


def test_gradient_equals_that_of_bitsandbytes():
    layer = layer_of(compute_dtype=torch.float16).half()
    x, upstream = with_outliers(6, 96, dtype=torch.float16), noise(6, 80, dtype=torch.float16, seed=1)
    grads = []
    for side in (layer, stock_layer(layer, 6.0)):
        leaf = x.clone().requires_grad_(True)
        side(leaf).backward(upstream)
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_backward_saves_only_weight_and_scales():
    layer = layer_of(512, 512, bias=False)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(noise(2, 512, requires_grad=True))
    kept = [(layer.weight.data_ptr(), torch.int8), (layer.weight.SCB.data_ptr(), torch.float32)]
    assert [(tensor.data_ptr(), tensor.dtype) for tensor in saved] == kept


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradient(use_reentrant):
    stack = nn.Sequential(layer_of(), nn.SiLU(), layer_of(80, 96, threshold=0.0))
    x = with_outliers(4, 96).requires_grad_(True)
    stack(x).sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(stack, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, expected)


class Block(nn.Module):
    def __init__(self, seed, checkpointed):
        super().__init__()
        self.up, self.down = layer_of(seed=seed), layer_of(80, 96, seed=seed + 9)
        self.checkpointed = checkpointed

    def hidden(self, x):
        return self.down(nn.functional.silu(self.up(x)))

    def forward(self, x):
        return x + (checkpoint(self.hidden, x, use_reentrant=False) if self.checkpointed else self.hidden(x))


@pytest.mark.parametrize("checkpointed", [True, False])
def test_compiles_once_for_different_outlier_columns(checkpointed):
    torch._dynamo.reset()
    blocks = nn.Sequential(*(Block(seed, checkpointed) for seed in range(2)))
    counter = CompileCounterWithBackend("aot_eager")
    samples = [noise(4, 96, requires_grad=True), with_outliers(4, 96).requires_grad_(True)]
    expected = []
    for x in samples:
        output = blocks(x)
        output.sum().backward()
        expected.append((output, x.grad))
        x.grad = None
    for block in blocks:
        block.compile(fullgraph=True, backend=counter)
    for x, (plain, grad) in zip(samples, expected, strict=True):
        output = blocks(x)
        output.sum().backward()
        assert torch.equal(output, plain)
        assert torch.equal(x.grad, grad)
    assert counter.frame_count == 1


def test_compiles_under_autocast_without_graph_breaks():
    torch._dynamo.reset()
    layer, x = layer_of(compute_dtype=torch.float32), with_outliers(4, 96, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(x)
        output = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.double, lambda m: m.type(torch.float16)])
def test_casts_do_not_change_weight_and_scales(cast):
    layer = layer_of()
    before = layer.dequantize(torch.float32)
    cast(layer)
    assert layer.bias.dtype != torch.bfloat16
    assert (type(layer.weight), layer.weight.dtype) == (Int8Params, torch.int8)
    assert layer.weight.SCB.dtype == torch.float32
    assert torch.equal(layer.dequantize(torch.float32), before)


def test_moves_include_the_scales_and_the_layer_runs_on_meta():
    layer = layer_of().to("meta")
    assert (type(layer.weight), layer.weight.SCB.device.type) == (Int8Params, "meta")
    x = torch.empty(3, 96, device="meta", requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert (output.shape, x.grad.shape) == ((3, 80), (3, 96))
    weight = layer_of().weight
    # Offloading frees the codes by moving them to meta, and later takes the scales from the parameter on meta.
    assert weight.to("meta").SCB is weight.SCB
    assert type(weight.to(torch.float32)) is torch.Tensor


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_complete(make_copy):
    layer = layer_of()
    pair = nn.ModuleList([layer, layer_of(seed=1)])
    pair[1].weight = layer.weight
    twin = make_copy(pair)
    assert isinstance(twin[0].weight, Int8Params)
    assert twin[0].weight.data_ptr() != layer.weight.data_ptr()
    assert twin[0].weight is twin[1].weight
    assert torch.equal(twin[0](noise(2, 96)), layer(noise(2, 96)))


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("start", ["meta", "filled"])
def test_state_dict_round_trip_with_bitsandbytes_names(assign, start):
    layer = layer_of()
    state = layer.state_dict()
    theirs = stock_layer(layer, 6.0).state_dict()
    assert list(state) == list(theirs) == ["weight", "bias", "SCB", "weight_format"]
    assert all(torch.equal(state[key], theirs[key]) for key in state)
    assert all(state[key].dtype == theirs[key].dtype for key in state)
    other = Linear8bit(96, 80, compute_dtype=torch.bfloat16) if start == "meta" else layer_of(seed=1)
    loaded = other.load_state_dict(theirs, assign=assign or start == "meta")
    assert str(loaded) == "<All keys matched successfully>"
    assert torch.equal(other(noise(2, 96)), layer(noise(2, 96)))


def test_floating_point_state_dict_is_quantized_when_loaded():
    linear = nn.Linear(96, 80).bfloat16()
    layer = Linear8bit(96, 80, compute_dtype=torch.bfloat16)
    assert layer.weight.is_meta
    with pytest.raises(RuntimeError, match=r"Linear8bit\(96, 80\)"):
        layer(noise(2, 96))
    layer.load_state_dict(linear.state_dict(), assign=True)
    assert torch.equal(layer.weight, quantize(linear.weight)[0])
    assert torch.equal(layer.bias, linear.bias)


def test_state_dict_of_another_layer_is_rejected_by_name():
    stack = nn.Sequential(layer_of())
    incomplete = stack.state_dict()
    del incomplete["0.SCB"]
    with pytest.raises(RuntimeError, match=r"0\.SCB: missing.*0\.weight"):
        stack.load_state_dict(incomplete)
    with pytest.raises(RuntimeError, match=r"0\.weight: .*torch.int8 \(80, 96\).*torch.int8 \(80, 64"):
        stack.load_state_dict(nn.Sequential(layer_of(64, 80)).state_dict())


def test_adapter_gradients_match_float64():
    layer = layer_of(compute_dtype=torch.float32, threshold=0.5).float()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(layer), config)
    tuned = model.base_model.model[0]
    x, upstream = noise(5, 96, dtype=torch.float32), noise(5, 80, dtype=torch.float32, seed=1)
    model(x).backward(upstream)
    down, up = (tuned.lora_A["default"].weight, tuned.lora_B["default"].weight)
    exact_down, exact_up = (w.detach().double().requires_grad_(True) for w in (down, up))
    (2.0 * (x.double() @ exact_down.T) @ exact_up.T).backward(upstream.double())
    torch.testing.assert_close(down.grad.double(), exact_down.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(up.grad.double(), exact_up.grad, rtol=1e-4, atol=1e-5)


def test_dora_magnitudes_are_the_row_norms_of_int8_weights():
    layer = layer_of(128, 64, compute_dtype=torch.float32).float()
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"], use_dora=True))
    magnitude = model.base_model.model[0].lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude, layer.dequantize(torch.float32).norm(dim=1), rtol=1e-4, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_gpu_output_and_gradient_match_the_cpu(threshold):
    layer = layer_of(256, 192, threshold=threshold)
    x = with_outliers(40, 256).requires_grad_(True)
    expected = layer(x)
    expected.sum().backward()
    expected_grad, x.grad = x.grad, None
    layer.cuda()
    assert layer.weight.SCB.is_cuda
    output = layer(x.cuda())
    output.sum().backward()
    torch.testing.assert_close(output.cpu(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(x.grad, expected_grad, rtol=2e-2, atol=2e-2)


def test_forward_calls_the_int8_op():
    layer, x = layer_of(), with_outliers(4, 96)
    expected = int8_ops.linear_int8(x, layer.weight.data, layer.weight.SCB, layer.bias, 6.0)
    assert torch.equal(layer(x), expected)
