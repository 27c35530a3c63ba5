"""Tests dequantizing models: the weights stay equal, and diffusers and transformers load the saved folders."""

import json

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from peft import LoraConfig
from torch import nn
from transformers import T5Config, T5EncoderModel

from halfbyte.quant.convert.dequantize import dequantize_model
from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.convert.replace_linears import convert
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.serialize import save_quantized
from halfbyte.quant.load.transformer import load_quantized

from judge import stock_bitsandbytes_on_cpu
from probe import prediction

CLASSES = [FluxTransformer2DModel, SD3Transformer2DModel]
RECIPES = [
    QuantRecipe(),
    QuantRecipe("fp4", double_quant=False, skip=("proj_out",)),
    QuantRecipe("int8", skip=("norm_out",)),
]


def load(folder, recipe=None, model_cls=SD3Transformer2DModel, dtype=torch.bfloat16):
    return load_quantized(model_cls, folder, recipe, dtype=dtype, device="cpu")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.quant_type)
@pytest.mark.parametrize("model_cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_model_saves_and_loads_in_diffusers(model_cls, recipe, dtype, request, tmp_path):
    name = "mini_flux" if model_cls is FluxTransformer2DModel else "mini_sd3"
    model = load(request.getfixturevalue(name) / "transformer", recipe, model_cls)
    weights = {
        path: m.dequantize(dtype) for path, m in model.named_modules() if isinstance(m, QuantizedLayer)
    }
    assert set(dequantize_model(model, dtype)) == set(weights)
    for path, weight in weights.items():
        layer = model.get_submodule(path)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, weight)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    frozen = [p for path in weights for p in model.get_submodule(path).parameters()]
    assert not any(parameter.requires_grad for parameter in frozen)
    assert "quantization_config" not in model.config
    assert model.config.num_layers == len(model.transformer_blocks)

    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    stock, info = model_cls.from_pretrained(tmp_path, torch_dtype=dtype, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in stock.state_dict().items())
    # Weights mapped from a file have another memory alignment, with which a product may sum in another order.
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(
        prediction(stock, dtype), prediction(model, dtype), rtol=tolerance, atol=tolerance
    )


def test_dequantized_output_equals_bitsandbytes_output(mini_sd3, tmp_path):
    for recipe in RECIPES:
        folder = tmp_path / recipe.quant_type
        model = load(mini_sd3 / "transformer", recipe)
        save_quantized(model, folder)
        with stock_bitsandbytes_on_cpu():
            stock = SD3Transformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
        dequantize_model(model, torch.bfloat16)
        # In train mode, which the probe sets, bitsandbytes on the CPU multiplies by the dequantized weight.
        assert torch.equal(prediction(model), prediction(stock)), recipe


def test_modules_kept_in_fp32_stay_in_fp32():
    class Kept(nn.Module):
        _keep_in_fp32_modules = ("scale",)

        def __init__(self):
            super().__init__()
            self.scale, self.body, self.norm = nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64)

    model = Kept()
    convert(model, QuantRecipe())
    assert dequantize_model(model, torch.float16) == ("body",)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        "scale.weight",
        "scale.bias",
    }
    assert dtypes["norm.weight"] == dtypes["body.bias"] == torch.float16


def test_shared_layer_stays_shared():
    layer = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(64, 64, bias=False)})
    convert(model, QuantRecipe())
    model["b"] = model["a"]
    assert dequantize_model(model, torch.float32) == ("a", "b", "c")
    assert model["a"] is model["b"]
    assert model["c"].bias is None


def test_dequantized_model_can_be_quantized_again(mini_sd3):
    model = load(mini_sd3 / "transformer", QuantRecipe(double_quant=False))
    before = prediction(model)
    dequantize_model(model, torch.bfloat16)
    convert(model, QuantRecipe(double_quant=False))
    # The values of the table are quantized to themselves.
    assert torch.equal(prediction(model), before)


def test_adapters_and_hooks_are_rejected_before_anything_changes(mini_sd3):
    model = load(mini_sd3 / "transformer", QuantRecipe())
    expected = prediction(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"^SD3Transformer2DModel: .*adapters.*delete_adapters"):
        dequantize_model(model, torch.bfloat16)
    model.delete_adapters("default")
    with pytest.raises(ValueError, match="adapters"):
        dequantize_model(model.transformer_blocks[0], torch.bfloat16)
    model = load(mini_sd3 / "transformer", QuantRecipe())
    handle = model.proj_out.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"^proj_out: .*hooks"):
        dequantize_model(model, torch.bfloat16)
    assert torch.equal(prediction(model), expected)
    handle.remove()
    dequantize_model(model, torch.bfloat16)
    with pytest.raises(ValueError, match=r"^SD3Transformer2DModel: .*no quantized layer"):
        dequantize_model(model, torch.bfloat16)


def test_device_alignment_hooks_move_to_the_plain_layers(mini_sd3):
    model = load(mini_sd3 / "transformer", QuantRecipe())
    plain = load(mini_sd3 / "transformer", QuantRecipe())
    add_hook_to_module(model.proj_out, AlignDevicesHook("cpu"))
    dequantize_model(model, torch.bfloat16)
    dequantize_model(plain, torch.bfloat16)
    assert isinstance(model.proj_out._hf_hook, AlignDevicesHook)
    assert torch.equal(prediction(model), prediction(plain))
    model = load(mini_sd3 / "transformer", QuantRecipe())
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"hooks.*offloading"):
        dequantize_model(model, torch.bfloat16)


def test_invalid_dtype_is_rejected():
    with pytest.raises(ValueError, match=r"^dtype: got torch\.int8\b.*float32"):
        dequantize_model(nn.Linear(2, 2), torch.int8)


def test_dequantized_text_encoder_loads_in_transformers(tmp_path):
    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=32, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4))
    convert(model, QuantRecipe(compute_dtype=torch.float32))
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    dequantize_model(model, torch.float32)
    model.save_pretrained(tmp_path)
    stock = T5EncoderModel.from_pretrained(tmp_path).eval()
    tokens = torch.arange(8)[None]
    assert torch.equal(stock(tokens).last_hidden_state, model.eval()(tokens).last_hidden_state)
