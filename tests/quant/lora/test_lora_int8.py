"""Tests LoRA layers on int8 bases against float64 and PEFT, their compilation and their saved files."""

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from halfbyte.kernels.int8 import reference as int8_reference
from halfbyte.quant.convert.dequantize import dequantize_model
from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.layers.linear8bit import Linear8bit
from halfbyte.quant.lora.layers import LORA_LAYERS, LoraLinear8bit, lora_linears
from halfbyte.trainer.adapters.lora import add_lora, save_adapter, trained_parameters
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.families.flux.family import Flux

from probe import prediction
from tensors import noise, relative_error

RANK, ALPHA = 4, 6


def make_base(inputs=96, outputs=80, *, bias=True, dtype=torch.float32, threshold=2.5, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias).to(dtype).requires_grad_(False)
    return Linear8bit.from_linear(linear, compute_dtype=dtype, threshold=threshold)


def adapt(base, layer_class=LoraLinear8bit, *, seed=0):
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights=False)
    layer = layer_class(base, "default", config=config, r=RANK, lora_alpha=ALPHA)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return layer


def factors(layer):
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def run_layer(layer, x, upstream):
    x = x.detach().requires_grad_(True)
    y = layer(x)
    return [y, *torch.autograd.grad(y, (x, *factors(layer)), upstream)]


def float64_reference(layer, x, upstream):
    """Computes the expected results, and the output without the rounding of activations.

    Gradients are computed in float64 with the dequantized weight. The expected output uses the int8 product.
    """
    base = layer.base_layer
    x = x.detach().double().requires_grad_(True)
    down, up = (factor.detach().double().requires_grad_(True) for factor in factors(layer))
    update = layer.scaling["default"] * (x @ down.t()) @ up.t()
    y = x @ base.dequantize(torch.float64).t() + update
    grads = torch.autograd.grad(y, (x, down, up), upstream.double())
    rows = x.detach().to(base.compute_dtype).flatten(end_dim=-2)
    product = int8_reference.linear_int8(
        rows.float(), base.weight.data, base.weight.SCB, None, base.threshold
    ).view(y.shape)
    bias = 0.0 if base.bias is None else base.bias.double()
    return [product.double() + update + bias, *grads], y + bias


@pytest.mark.parametrize("rows", [(1,), (7,), (40,), (2, 5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 2.5])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
def test_output_and_gradients_match_float64(rows, bias, threshold, dtype, bound):
    layer = adapt(make_base(bias=bias, dtype=dtype, threshold=threshold))
    x, upstream = noise(*rows, 96, dtype=dtype), noise(*rows, 80, dtype=dtype, seed=1)
    expected, plain = float64_reference(layer, x, upstream)
    results = run_layer(layer, x, upstream)
    for ours, right in zip(results, expected, strict=True):
        assert relative_error(ours, right) < bound
    # The error of rounding the activations to 8 bits.
    assert relative_error(results[0], plain) < 0.02


def test_output_and_gradients_match_peft():
    layer = adapt(make_base())
    reference = adapt(layer.base_layer, peft_layer.Linear)
    x, upstream = noise(9, 96), noise(9, 80, seed=1)
    for ours, theirs in zip(run_layer(layer, x, upstream), run_layer(reference, x, upstream), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_backward_saves_the_input_and_the_small_factors():
    layer = adapt(make_base(dtype=torch.bfloat16))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer(noise(40, 96, dtype=torch.bfloat16).requires_grad_(True))
    assert [tuple(tensor.shape) for tensor in saved] == [(40, 96), (40, RANK), (RANK, 96), (80, RANK)]


def test_int8_and_plain_layers_are_computed_together():
    plain = nn.Linear(96, 64).requires_grad_(False)
    layers = [adapt(make_base(seed=1), seed=1), adapt(plain, LORA_LAYERS[nn.Linear], seed=2)]
    x = noise(5, 96).requires_grad_(True)
    together = lora_linears(x, layers)
    assert len({y.grad_fn.next_functions[0][0] for y in together}) == 1
    for ours, layer in zip(together, layers, strict=True):
        torch.testing.assert_close(ours, layer(x), rtol=1e-5, atol=1e-5)


def test_compiles_with_checkpointing_without_graph_breaks():
    torch._dynamo.reset()
    layer = adapt(make_base(dtype=torch.bfloat16))
    x = noise(6, 96, dtype=torch.bfloat16).requires_grad_(True)

    def step(call):
        with torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(call, x, use_reentrant=False)
        return [y, *torch.autograd.grad(y.float().square().sum(), (x, *factors(layer)))]

    expected = step(layer)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x: checkpoint(layer, x, use_reentrant=False), fullgraph=True, backend=counter
    )
    assert all(map(torch.equal, step(compiled), expected))
    assert counter.frame_count == 1


def test_merging_into_an_int8_base_is_rejected():
    with pytest.raises(ValueError, match=r"merge.*int8"):
        adapt(make_base()).merge()


def test_saved_adapter_loads_in_diffusers_on_int8_and_dequantized_bases(mini_flux, tmp_path):
    family = Flux.open(str(mini_flux), None, 24)
    recipe = QuantRecipe(quant_type="int8", compute_dtype=torch.float32, llm_int8_threshold=0.5)

    def loaded():
        return load_base(family, recipe, device=torch.device("cpu"), dtype=torch.float32)

    denoiser = loaded()
    targets = family.lora_targets("all-linear")
    add_lora(denoiser, rank=4, alpha=6, dropout=0.0, targets=targets, init="gaussian", seed=1)
    assert {type(m) for m in denoiser.modules() if isinstance(m, peft_layer.Linear)} == {LoraLinear8bit}
    for name, parameter in trained_parameters(denoiser).items():
        if ".lora_B." in name:
            parameter.data.copy_(0.05 * noise(*parameter.shape))
    save_adapter(denoiser, FluxPipeline, str(tmp_path))
    plain = loaded()
    dequantize_model(plain, torch.float32)
    for base, tolerance in ((loaded(), 1e-4), (plain, 2e-2)):
        pipeline = FluxPipeline.from_pretrained(mini_flux, transformer=base, dtype=torch.float32)
        pipeline.load_lora_weights(tmp_path)
        tuned = prediction(pipeline.transformer, torch.float32)
        torch.testing.assert_close(tuned, prediction(denoiser, torch.float32), rtol=0, atol=tolerance)
        pipeline.disable_lora()
        assert (prediction(pipeline.transformer, torch.float32) - tuned).abs().max() > 0.05
