"""Tests DoRA layers on packed and plain bases against float64 and PEFT's own layer."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from halfbyte.quant.formats.nf4 import QuantSpec
from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.quant.layers.linear8bit import Linear8bit
from halfbyte.quant.lora.layers import LORA_LAYERS, LoraLinear, lora_linears

from tensors import noise, relative_error

INPUTS, OUTPUTS, RANK, ALPHA = 96, 80, 4, 6
BASES = ["nf4", "int8", "plain"]


def make_base(kind, *, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(INPUTS, OUTPUTS, bias).to(dtype).requires_grad_(False)
    if kind == "nf4":
        return Linear4bit.from_linear(linear, spec=QuantSpec(), compute_dtype=dtype)
    if kind == "int8":
        return Linear8bit.from_linear(linear, threshold=0.0, compute_dtype=dtype)
    return linear


def adapt(base, layer_class=None, *, start=False, seed=0, **options):
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True, init_lora_weights=start, **options)
    layer_class = layer_class or LORA_LAYERS.get(type(base), LoraLinear)
    layer = layer_class(base, "default", config=config, r=RANK, lora_alpha=ALPHA)
    if not start:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in trainable_parameters(layer).items():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise
    return layer


def trainable_parameters(layer):
    return {name: parameter for name, parameter in layer.named_parameters() if "lora_" in name}


def dense(base):
    weight = base.dequantize(torch.float32) if hasattr(base, "dequantize") else base.weight
    return weight.detach().double()


def float64_reference(layer, x, upstream):
    """Computes the output and the gradients of x, A, B and m in float64; the row norms are constants."""
    x = x.detach().double().requires_grad_(True)
    a, b, m = (
        parameter.detach().double().requires_grad_(True) for parameter in trainable_parameters(layer).values()
    )
    adapted = dense(layer.base_layer) + ALPHA / RANK * b @ a
    y = x @ adapted.t() * (m / adapted.norm(dim=1).detach())
    if layer.base_layer.bias is not None:
        y = y + layer.base_layer.bias.double()
    return [y, *torch.autograd.grad(y, (x, a, b, m), upstream.double())]


def run_layer(layer, x, upstream):
    x = x.detach().requires_grad_(True)
    y = layer(x)
    return [y, *torch.autograd.grad(y, (x, *trainable_parameters(layer).values()), upstream.to(y.dtype))]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", BASES)
def test_outputs_and_gradients_match_float64(kind, bias):
    layer = adapt(make_base(kind, bias=bias))
    x, upstream = noise(3, 5, INPUTS), noise(3, 5, OUTPUTS, seed=2)
    # LLM.int8() also rounds activations to 8 bits.
    bound = 2e-2 if kind == "int8" else 3e-6
    for ours, expected in zip(
        run_layer(layer, x, upstream), float64_reference(layer, x, upstream), strict=True
    ):
        assert relative_error(ours, expected) < bound


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", BASES)
def test_base_with_a_hook_is_called_and_gives_the_same_result(kind, bias):
    layer = adapt(make_base(kind, bias=bias))
    x, upstream = noise(7, INPUTS), noise(7, OUTPUTS, seed=2)
    fused, calls = run_layer(layer, x, upstream), []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    for ours, theirs in zip(run_layer(layer, x, upstream), fused, strict=True):
        assert relative_error(ours, theirs.double()) < 2e-6
    assert calls == [1]


def test_output_and_gradients_match_pefts_layer():
    layer = adapt(make_base("plain"))
    twin = adapt(make_base("plain"), peft_layer.Linear)
    twin.load_state_dict(layer.state_dict())
    x, upstream = noise(7, INPUTS), noise(7, OUTPUTS, seed=2)
    for ours, theirs in zip(run_layer(layer, x, upstream), run_layer(twin, x, upstream), strict=True):
        assert relative_error(ours, theirs.double()) < 2e-6


@pytest.mark.parametrize("kind", BASES)
def test_new_adapter_does_not_change_the_output(kind):
    base = make_base(kind)
    x = noise(7, INPUTS)
    before = base(x)
    layer = adapt(base, start=True)
    assert torch.allclose(layer(x), before, atol=1e-6)
    assert set(trainable_parameters(layer)) == set(layer.state_dict()) - {
        name for name in layer.state_dict() if name.startswith("base_layer.")
    }, "base_squares is computed from the base and must not be saved"


def test_bf16_error_is_not_larger_than_pefts():
    """The reference is PEFT's layer with the same weights in the same precision."""
    x, upstream = noise(64, INPUTS), noise(64, OUTPUTS, seed=2)
    layer = adapt(make_base("plain", dtype=torch.bfloat16))
    twin = adapt(make_base("plain", dtype=torch.bfloat16), peft_layer.Linear)
    twin.load_state_dict(layer.state_dict())
    expected = float64_reference(layer, x.bfloat16(), upstream.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (run_layer(one, x.bfloat16(), upstream.bfloat16()) for one in (layer, twin))
    for one, other, wanted in zip(ours, theirs, expected, strict=True):
        assert relative_error(one, wanted) < 1.5 * relative_error(other, wanted)


def test_layers_that_share_an_input_match_separate_layers():
    layers = [adapt(make_base("nf4", seed=seed), seed=seed) for seed in (1, 2, 3)]
    x = noise(5, INPUTS)
    for expected, ours in zip([layer(x) for layer in layers], lora_linears(x, layers), strict=True):
        assert torch.allclose(expected, ours, atol=1e-5)


@pytest.mark.parametrize("kind", BASES)
def test_dropout_applies_to_the_adapters_input_only(kind):
    layer = adapt(make_base(kind), lora_dropout=0.5).train()
    x = noise(7, INPUTS)
    torch.manual_seed(0)
    dropped = layer(x)
    torch.manual_seed(0)
    adapter_input = nn.functional.dropout(x, 0.5)
    a, b, m = trainable_parameters(layer).values()
    adapted = dense(layer.base_layer).float() + ALPHA / RANK * b @ a
    gain = m / adapted.norm(dim=1)
    direct = layer.base_layer(x) - layer.base_layer.bias
    update = ALPHA / RANK * adapter_input @ a.t() @ b.t()
    expected = gain * (direct + update) + layer.base_layer.bias
    assert torch.allclose(dropped, expected, atol=1e-4)
    layer.eval()
    assert not torch.allclose(layer(x), dropped, atol=1e-4)


def test_layer_compiles_without_graph_breaks():
    layer = adapt(make_base("nf4"))
    counter = CompileCounterWithBackend("aot_eager")
    x, upstream = noise(7, INPUTS), noise(7, OUTPUTS, seed=2)
    eager = run_layer(layer, x, upstream)
    compiled = run_layer(torch.compile(layer, backend=counter, fullgraph=True), x, upstream)
    assert counter.frame_count == 1
    for one, other in zip(eager, compiled, strict=True):
        assert relative_error(one, other.double()) < 1e-6


def test_merging_and_unmerging_a_plain_base_keeps_the_output():
    layer = adapt(make_base("plain"))
    x = noise(7, INPUTS)
    before = layer(x)
    layer.merge()
    assert torch.allclose(layer(x), before, atol=1e-5)
    layer.unmerge()
    assert torch.allclose(layer(x), before, atol=1e-5)
