"""DoRA's layer: float64 and PEFT's own layer as judges, over packed and plain bases."""

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


def base_of(kind, *, bias=True, dtype=torch.float32, seed=0):
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
        draws = torch.Generator().manual_seed(seed)
        for name, parameter in learning(layer).items():
            noise = 0.1 * torch.randn(parameter.shape, generator=draws)
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise
    return layer


def learning(layer):
    return {name: parameter for name, parameter in layer.named_parameters() if "lora_" in name}


def dense(base):
    weight = base.dequantize(torch.float32) if hasattr(base, "dequantize") else base.weight
    return weight.detach().double()


def exact(layer, x, upstream):
    """Output and gradients of x, A, B and m in float64; the lengths are a constant of the backward."""
    x = x.detach().double().requires_grad_(True)
    a, b, m = (parameter.detach().double().requires_grad_(True) for parameter in learning(layer).values())
    adapted = dense(layer.base_layer) + ALPHA / RANK * b @ a
    y = x @ adapted.t() * (m / adapted.norm(dim=1).detach())
    if layer.base_layer.bias is not None:
        y = y + layer.base_layer.bias.double()
    return [y, *torch.autograd.grad(y, (x, a, b, m), upstream.double())]


def computed(layer, x, upstream):
    x = x.detach().requires_grad_(True)
    y = layer(x)
    return [y, *torch.autograd.grad(y, (x, *learning(layer).values()), upstream.to(y.dtype))]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", BASES)
def test_outputs_and_gradients_match_float64(kind, bias):
    layer = adapt(base_of(kind, bias=bias))
    x, upstream = noise(3, 5, INPUTS), noise(3, 5, OUTPUTS, seed=2)
    # LLM.int8() rounds activations to 8 bits as well.
    bound = 2e-2 if kind == "int8" else 3e-6
    for ours, expected in zip(computed(layer, x, upstream), exact(layer, x, upstream), strict=True):
        assert relative_error(ours, expected) < bound


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", BASES)
def test_a_base_with_a_hook_is_called_and_gives_the_same(kind, bias):
    layer = adapt(base_of(kind, bias=bias))
    x, upstream = noise(7, INPUTS), noise(7, OUTPUTS, seed=2)
    fused, calls = computed(layer, x, upstream), []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    for ours, theirs in zip(computed(layer, x, upstream), fused, strict=True):
        assert relative_error(ours, theirs.double()) < 2e-6
    assert calls == [1]


def test_pefts_own_layer_agrees():
    layer = adapt(base_of("plain"))
    twin = adapt(base_of("plain"), peft_layer.Linear)
    twin.load_state_dict(layer.state_dict())
    x, upstream = noise(7, INPUTS), noise(7, OUTPUTS, seed=2)
    for ours, theirs in zip(computed(layer, x, upstream), computed(twin, x, upstream), strict=True):
        assert relative_error(ours, theirs.double()) < 2e-6


@pytest.mark.parametrize("kind", BASES)
def test_a_new_adapter_changes_nothing(kind):
    base = base_of(kind)
    x = noise(7, INPUTS)
    before = base(x)
    layer = adapt(base, start=True)
    assert torch.allclose(layer(x), before, atol=1e-6)
    assert set(learning(layer)) == set(layer.state_dict()) - {
        name for name in layer.state_dict() if name.startswith("base_layer.")
    }, "the lengths of the base's rows are in no file"


def test_bf16_is_as_good_as_the_plain_layer():
    """The judge is PEFT's layer over the same weights in the same precision."""
    x, upstream = noise(64, INPUTS), noise(64, OUTPUTS, seed=2)
    layer = adapt(base_of("plain", dtype=torch.bfloat16))
    twin = adapt(base_of("plain", dtype=torch.bfloat16), peft_layer.Linear)
    twin.load_state_dict(layer.state_dict())
    expected = exact(layer, x.bfloat16(), upstream.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (computed(one, x.bfloat16(), upstream.bfloat16()) for one in (layer, twin))
    for one, other, wanted in zip(ours, theirs, expected, strict=True):
        assert relative_error(one, wanted) < 1.5 * relative_error(other, wanted)


def test_layers_that_share_an_input_agree_with_themselves():
    layers = [adapt(base_of("nf4", seed=seed), seed=seed) for seed in (1, 2, 3)]
    x = noise(5, INPUTS)
    for alone, together in zip([layer(x) for layer in layers], lora_linears(x, layers), strict=True):
        assert torch.allclose(alone, together, atol=1e-5)


@pytest.mark.parametrize("kind", BASES)
def test_dropout_thins_only_what_the_adapter_sees(kind):
    layer = adapt(base_of(kind), lora_dropout=0.5).train()
    x = noise(7, INPUTS)
    torch.manual_seed(0)
    dropped = layer(x)
    torch.manual_seed(0)
    seen = nn.functional.dropout(x, 0.5)
    a, b, m = learning(layer).values()
    adapted = dense(layer.base_layer).float() + ALPHA / RANK * b @ a
    gain = m / adapted.norm(dim=1)
    direct = layer.base_layer(x) - layer.base_layer.bias
    expected = gain * (direct + ALPHA / RANK * seen @ a.t() @ b.t()) + layer.base_layer.bias
    assert torch.allclose(dropped, expected, atol=1e-4)
    layer.eval()
    assert not torch.allclose(layer(x), dropped, atol=1e-4)


def test_the_layer_compiles_whole():
    layer = adapt(base_of("nf4"))
    counter = CompileCounterWithBackend("aot_eager")
    x, upstream = noise(7, INPUTS), noise(7, OUTPUTS, seed=2)
    eager = computed(layer, x, upstream)
    compiled = computed(torch.compile(layer, backend=counter, fullgraph=True), x, upstream)
    assert counter.frame_count == 1
    for one, other in zip(eager, compiled, strict=True):
        assert relative_error(one, other.double()) < 1e-6


def test_a_plain_base_merges_as_pefts():
    layer = adapt(base_of("plain"))
    x = noise(7, INPUTS)
    before = layer(x)
    layer.merge()
    assert torch.allclose(layer(x), before, atol=1e-5)
    layer.unmerge()
    assert torch.allclose(layer(x), before, atol=1e-5)
