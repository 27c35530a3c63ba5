"""Tests 4-bit layers in a model with PEFT's adapters, and with bitsandbytes and diffusers."""

from functools import partial

import bitsandbytes as bnb
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.formats.nf4 import QuantSpec
from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.quant.load.transformer import load_quantized

from probe import prediction
from tensors import noise as noise_in

noise = partial(noise_in, dtype=torch.bfloat16)


def layer_of(in_features=96, out_features=80, *, bias=True, compute_dtype=torch.bfloat16, seed=0, **spec):
    torch.manual_seed(seed)
    linear = nn.Linear(in_features, out_features, bias).bfloat16()
    return Linear4bit.from_linear(linear, spec=QuantSpec(**spec), compute_dtype=compute_dtype)


@pytest.fixture
def flux(mini_flux):
    return load_quantized(
        FluxTransformer2DModel, mini_flux / "transformer", QuantRecipe(), dtype=torch.bfloat16, device="cpu"
    )


TARGETS = ["to_q", "to_out.0", "proj_mlp", "proj_out", "norm1.linear"]


def fill_adapter(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2


def test_memory_footprint_is_the_sum_of_the_models_tensors(flux):
    on_disk = sum(tensor.nbytes for key, tensor in flux.state_dict().items() if "quant_state" not in key)
    offsets = 4 * sum(isinstance(module, Linear4bit) for module in flux.modules())
    assert flux.get_memory_footprint() == on_disk + offsets


def test_add_adapter_trains_lora_on_our_layers(flux):
    bare = prediction(flux)
    flux.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    tuned = flux.transformer_blocks[0].attn.to_q
    assert isinstance(tuned.base_layer, Linear4bit)
    assert tuned.lora_A["default"].weight.shape == (4, 64)
    assert torch.equal(prediction(flux), bare)
    fill_adapter(flux)
    assert not torch.equal(prediction(flux), bare)

    trainable = {name for name, parameter in flux.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name in trainable if "lora_" in name}
    flux.disable_adapters()
    assert torch.equal(prediction(flux), bare)


def test_adapter_gradients_match_float64():
    layer = layer_of(compute_dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(layer), config)
    tuned = model.base_model.model[0]
    assert tuned.get_base_layer() is layer
    x, upstream = noise(5, 96, dtype=torch.float32), noise(5, 80, dtype=torch.float32, seed=1)
    model(x).backward(upstream)

    down = tuned.lora_A["default"].weight.detach().double().requires_grad_(True)
    up = tuned.lora_B["default"].weight.detach().double().requires_grad_(True)
    base = nn.functional.linear(x.double(), layer.dequantize(torch.float64), layer.bias.double())
    (base + 2.0 * (x.double() @ down.T) @ up.T).backward(upstream.double())
    torch.testing.assert_close(tuned.lora_A["default"].weight.grad.double(), down.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tuned.lora_B["default"].weight.grad.double(), up.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_reads_our_state(double_quant):
    layer = layer_of(128, 64, double_quant=double_quant)
    assert torch.equal(
        bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state), layer.dequantize()
    )


def test_dora_magnitudes_are_the_row_norms_of_our_weights():
    layer = layer_of(128, 64, compute_dtype=torch.float32)
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"], use_dora=True))
    magnitude = model.base_model.model[0].lora_magnitude_vector["default"].weight
    torch.testing.assert_close(
        magnitude.float(), layer.dequantize(torch.float32).norm(dim=1), rtol=1e-2, atol=0
    )
    x = noise(3, 128, dtype=torch.float32)
    torch.testing.assert_close(model(x), layer(x), rtol=1e-2, atol=1e-2)


def test_get_peft_model_finds_all_linears(flux):
    model = get_peft_model(flux, LoraConfig(r=2, target_modules="all-linear"))
    tuned = {
        name.removesuffix(".lora_A.default.weight")
        for name, _ in model.named_parameters()
        if "lora_A" in name
    }
    linears = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert {f"{name}.base_layer" for name in tuned} == linears


def test_saved_adapter_loads_on_4bit_and_plain_layers(flux, mini_flux, tmp_path):
    flux.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    fill_adapter(flux)
    FluxPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(flux))
    expected = prediction(flux)

    fresh = load_quantized(
        FluxTransformer2DModel, mini_flux / "transformer", QuantRecipe(), dtype=torch.bfloat16, device="cpu"
    )
    pipeline = FluxPipeline.from_pretrained(mini_flux, transformer=fresh, torch_dtype=torch.bfloat16)
    pipeline.load_lora_weights(tmp_path, adapter_name="default")
    loaded, saved = get_peft_model_state_dict(fresh), get_peft_model_state_dict(flux)
    assert {name: tensor.shape for name, tensor in loaded.items()} == {
        name: tensor.shape for name, tensor in saved.items()
    }
    torch.testing.assert_close(prediction(fresh), expected, rtol=2e-2, atol=2e-2)

    stock = FluxPipeline.from_pretrained(mini_flux, torch_dtype=torch.bfloat16)
    stock.load_lora_weights(tmp_path, adapter_name="default")
    assert set(get_peft_model_state_dict(stock.transformer)) == set(saved)
