"""Tests the 4-bit layer: forward and backward, moves, casts and copies, state dicts, and compilation."""

import copy
import pickle
from functools import partial

import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from halfbyte.quant.formats.nf4 import QuantSpec
from halfbyte.quant.layers.linear4bit import Linear4bit, Params4bit

from tensors import noise as noise_in

noise = partial(noise_in, dtype=torch.bfloat16)


def layer_of(in_features=96, out_features=80, *, bias=True, compute_dtype=torch.bfloat16, seed=0, **spec):
    torch.manual_seed(seed)
    linear = nn.Linear(in_features, out_features, bias).bfloat16()
    return Linear4bit.from_linear(linear, spec=QuantSpec(**spec), compute_dtype=compute_dtype)


@pytest.mark.parametrize("shape", [(96,), (1, 96), (3, 5, 96), (0, 96)])
@pytest.mark.parametrize("spec", [{}, {"double_quant": False}, {"quant_type": "fp4"}])
def test_forward_multiplies_by_the_dequantized_weight(shape, spec):
    layer = layer_of(**spec)
    x = noise(*shape)
    expected = nn.functional.linear(x, layer.dequantize(), layer.bias)
    assert torch.equal(layer(x), expected)


def test_output_has_the_inputs_dtype():
    layer = layer_of()
    x = noise(3, 96, dtype=torch.float32)
    output = layer(x)
    assert output.dtype == torch.float32
    assert torch.equal(output, layer(x.bfloat16()).float())


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_output_equals_that_of_a_plain_linear(x_dtype):
    layer = layer_of(compute_dtype=torch.float32)
    plain = nn.Linear(96, 80)
    plain.load_state_dict({"weight": layer.dequantize(torch.float32), "bias": layer.bias.float()})
    x = noise(3, 96, dtype=x_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, expected = layer(x), plain(x)
    assert ours.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("rows", [(), (4, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_match_autograd_in_float64(bias, rows):
    layer = layer_of(bias=bias, compute_dtype=torch.float32)
    if bias:
        layer.bias = nn.Parameter(layer.bias.float())
    x = noise(*rows, 96, dtype=torch.float32, requires_grad=True)
    upstream = noise(*rows, 80, dtype=torch.float32, seed=1)
    layer(x).backward(upstream)

    exact_x = x.detach().double().requires_grad_(True)
    exact_bias = layer.bias.detach().double().requires_grad_(True) if bias else None
    nn.functional.linear(exact_x, layer.dequantize(torch.float64), exact_bias).backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-5, atol=1e-5)
    if bias:
        torch.testing.assert_close(layer.bias.grad.double(), exact_bias.grad, rtol=1e-5, atol=1e-5)
    assert layer.weight.grad is None


def test_bf16_gradient_is_within_bf16_of_float64():
    layer = layer_of()
    x = noise(16, 96, requires_grad=True)
    layer(x).backward(noise(16, 80, seed=1))
    exact = noise(16, 80, seed=1).double() @ layer.dequantize(torch.float64)
    assert (x.grad.double() - exact).norm() / exact.norm() < 4e-3


def test_backward_saves_only_the_packed_weight():
    layer = layer_of(512, 512, bias=False)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(noise(2, 512, requires_grad=True))
    assert [(tensor.dtype, tensor.data_ptr()) for tensor in saved] == [(torch.uint8, layer.weight.data_ptr())]


def test_backward_uses_the_dtype_of_the_forward_under_autocast():
    layer = layer_of(compute_dtype=torch.float32)
    x = noise(4, 96, dtype=torch.float32, requires_grad=True)
    upstream = noise(4, 80, dtype=torch.float32, seed=1)
    output = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output.backward(upstream)
    assert torch.equal(x.grad, upstream @ layer.dequantize(torch.float32))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradient(use_reentrant):
    stack = nn.Sequential(layer_of(), nn.SiLU(), layer_of(80, 96, double_quant=False))
    x = noise(4, 96, requires_grad=True)
    stack(x).sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(stack, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, expected)


class Block(nn.Module):
    def __init__(self, seed, checkpointed):
        super().__init__()
        self.up, self.down = layer_of(seed=seed), layer_of(80, 96, double_quant=False, seed=seed + 9)
        self.checkpointed = checkpointed

    def hidden(self, x):
        return self.down(nn.functional.silu(self.up(x)))

    def forward(self, x):
        return x + (checkpoint(self.hidden, x, use_reentrant=False) if self.checkpointed else self.hidden(x))


@pytest.mark.parametrize("checkpointed", [True, False])
def test_equal_blocks_compile_once_without_graph_breaks(checkpointed):
    torch._dynamo.reset()
    blocks = nn.Sequential(*(Block(seed, checkpointed) for seed in range(3)))
    x = noise(4, 96, requires_grad=True)
    expected = blocks(x)
    expected.sum().backward()
    expected_grad, x.grad = x.grad, None

    counter = CompileCounterWithBackend("aot_eager")
    for block in blocks:
        block.compile(fullgraph=True, backend=counter)
    output = blocks(x)
    output.sum().backward()
    assert torch.equal(output, expected)
    assert torch.equal(x.grad, expected_grad)
    assert counter.frame_count == 1


def test_compiles_under_autocast_without_graph_breaks():
    torch._dynamo.reset()
    layer = layer_of(compute_dtype=torch.float32)
    x = noise(4, 96, dtype=torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(x)
        output = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    output.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.double, lambda m: m.type(torch.float16)])
def test_casts_do_not_change_codes_and_statistics(cast):
    layer = layer_of()
    before = layer.dequantize()
    cast(layer)
    assert layer.bias.dtype != torch.bfloat16
    assert layer.weight.dtype == torch.uint8
    assert isinstance(layer.weight, Params4bit)
    assert layer.weight.quant_state.nested.absmax.dtype == torch.float32
    assert torch.equal(layer.dequantize(), before)


def test_moves_include_the_statistics():
    layer = layer_of().to("meta")
    assert isinstance(layer.weight, Params4bit)
    state = layer.weight.quant_state
    tensors = [
        layer.weight,
        state.absmax,
        state.code,
        state.nested.absmax,
        state.nested.code,
        state.nested.offset,
    ]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_forward_and_backward_run_on_meta():
    layer = layer_of().to("meta")
    x = torch.empty(3, 96, device="meta", requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert (output.shape, output.dtype) == ((3, 80), torch.float32)
    assert x.grad.shape == x.shape


def test_accelerate_moves_the_parameter_and_its_state():
    layer = layer_of()
    set_module_tensor_to_device(layer, "weight", "cpu", value=layer.weight.data.clone())
    assert torch.equal(layer(noise(2, 96)), layer_of()(noise(2, 96)))


def test_to_keeps_the_state_unless_the_dtype_changes():
    weight = layer_of().weight
    # Offloading frees the codes by moving them to meta, and later takes the state from the parameter on meta.
    assert weight.to("meta").quant_state is weight.quant_state
    assert type(weight.to(torch.float32)) is torch.Tensor


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_complete(make_copy):
    layer = layer_of()
    twin = make_copy(layer)
    assert isinstance(twin.weight, Params4bit)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    assert torch.equal(twin(noise(2, 96)), layer(noise(2, 96)))


def test_deepcopy_keeps_a_shared_weight_shared():
    layer = layer_of()
    pair = nn.ModuleList([layer, layer_of()])
    pair[1].weight = layer.weight
    twin = copy.deepcopy(pair)
    assert twin[0].weight is twin[1].weight


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("start", ["meta", "filled"])
@pytest.mark.parametrize("spec", [{}, {"double_quant": False, "blocksize": 128}, {"quant_type": "fp4"}])
def test_state_dict_round_trip(assign, start, spec):
    layer = layer_of(**spec)
    state = layer.state_dict()
    other = layer_of(seed=1)
    if start == "meta":
        other = Linear4bit(96, 80, spec=QuantSpec(), compute_dtype=torch.bfloat16)
    assert (
        str(other.load_state_dict(state, assign=assign or start == "meta"))
        == "<All keys matched successfully>"
    )
    assert torch.equal(other(noise(2, 96)), layer(noise(2, 96)))
    assert other.spec == layer.spec
    again = other.state_dict()
    assert list(again) == list(state)
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_floating_point_state_dict_is_quantized_when_loaded():
    linear = nn.Linear(96, 80).bfloat16()
    layer = Linear4bit(96, 80, spec=QuantSpec(), compute_dtype=torch.bfloat16)
    layer.load_state_dict(linear.state_dict(), assign=True)
    expected = Linear4bit.from_linear(linear, spec=QuantSpec(), compute_dtype=torch.bfloat16)
    assert torch.equal(layer.weight, expected.weight)
    assert torch.equal(layer.bias, linear.bias)


def test_state_dict_of_another_layer_is_rejected_by_name():
    stack = nn.Sequential(layer_of())
    with pytest.raises(RuntimeError, match=r"0\.weight: .*\(80, 96\).*\(80, 64\)"):
        stack.load_state_dict(nn.Sequential(layer_of(64, 80)).state_dict())
    incomplete = stack.state_dict()
    del incomplete["0.weight.absmax"]
    with pytest.raises(RuntimeError, match=r"0\.weight\.absmax: missing"):
        stack.load_state_dict(incomplete)
    without_weight = {key: value for key, value in stack.state_dict().items() if key == "0.bias"}
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        stack.load_state_dict(without_weight)


def test_layer_on_meta_has_the_weights_shape_and_reports_that_it_is_empty():
    layer = Linear4bit(96, 80, spec=QuantSpec(), compute_dtype=torch.bfloat16, dtype=torch.bfloat16)
    assert isinstance(layer.weight, Params4bit)
    assert (layer.weight.shape, layer.weight.dtype) == ((80, 96), torch.bfloat16)
    assert layer.weight.is_meta
    assert set(layer.state_dict()) == {"weight", "bias"}
    with pytest.raises(RuntimeError, match=r"Linear4bit\(96, 80\)"):
        layer(noise(2, 96))


def test_footprint_counts_codes_and_statistics():
    weight = layer_of(128, 128, bias=False).weight
    blocks = 128 * 128 // 64
    assert weight.nelement() == 128 * 128 // 2 + blocks + 4 * (1 + 16 + 256 + 1)
    assert weight.numel() == 128 * 128 // 2


@pytest.mark.gpu
def test_weight_is_the_same_after_moves_to_and_from_the_gpu():
    layer = layer_of()
    expected = layer.dequantize()
    layer.cuda()
    assert layer.weight.quant_state.nested.offset.is_cuda
    assert torch.equal(layer.dequantize().cpu(), expected)
    x = noise(4, 96, requires_grad=True)
    layer(x.cuda()).sum().backward()
    assert x.grad.isfinite().all()
    assert torch.equal(layer.cpu().dequantize(), expected)
