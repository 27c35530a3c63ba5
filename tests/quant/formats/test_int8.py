"""Tests LLM.int8() weights and files: equality with bitsandbytes in both directions, and rejected files."""

import json
import logging
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel, SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.convert.replace_linears import convert
from halfbyte.quant.files.shards import INDEX_FILE, WEIGHTS_FILE
from halfbyte.quant.formats.int8 import dequantize, quantize, split_key, unpack_scales
from halfbyte.quant.layers.linear8bit import Linear8bit
from halfbyte.quant.load.serialize import quantization_config, read_quantization_config, save_quantized
from halfbyte.quant.load.transformer import load_quantized
from halfbyte.trainer.denoiser.settings import quant_recipe
from halfbyte.trainer.recipe.load import load_recipe

from judge import stock_bitsandbytes_on_cpu
from probe import inputs, prediction
from repository import RECIPES

CLASSES = [FluxTransformer2DModel, SD3Transformer2DModel]
RECIPE = QuantRecipe("int8", skip=("proj_out",), llm_int8_threshold=4.0)


def noise(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantized_weights_match_bitsandbytes(dtype):
    weight = noise(300, 200, dtype=dtype) * 0.05
    quantized, scales = quantize(weight)
    expected, expected_scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    assert torch.equal(scales, expected_scales)
    steps = (quantized.int() - expected.int()).abs()
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < 1e-4


def test_relative_error_on_gaussian_weights():
    weight = noise(256, 3072, dtype=torch.float32)
    error = (dequantize(*quantize(weight), torch.float32) - weight).norm() / weight.norm()
    assert 0.0082 < error < 0.0088


def test_rows_of_zeros_are_restored_as_zeros():
    weight = noise(4, 64)
    weight[1] = 0
    quantized, scales = quantize(weight)
    assert scales[1] == 0
    assert (dequantize(quantized, scales, torch.bfloat16)[1] == 0).all()


@pytest.mark.parametrize(
    ("weight", "pattern"),
    [
        (torch.zeros(4, 4, dtype=torch.int8), r"torch\.int8\b.*float32"),
        (torch.zeros(4, 0), r"\(4, 0\)"),
        (torch.zeros(4), r"\(4,\)"),
        (torch.full((4, 4), float("nan")), "NaN"),
        (torch.full((4, 4), -float("inf")), "infinite"),
        (torch.full((4, 4), -1e5), r"100000\b.*fp16.*65504"),
    ],
)
def test_weights_that_cannot_be_quantized_are_rejected_by_name(weight, pattern):
    with pytest.raises(ValueError, match=f"^blocks.0.weight: .*{pattern}"):
        quantize(weight, "blocks.0.weight")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"SCB": torch.ones(7)}, r"a\.SCB: .*torch.float32 \(8,\).*torch.float32 \(7,\)"),
        ({"SCB": torch.ones(8).half()}, r"a\.SCB: .*torch.float32 \(8,\).*torch.float16"),
        ({"SCB": torch.full((8,), float("nan"))}, r"a\.SCB: .*NaN"),
        ({"SCB": -torch.ones(8)}, r"a\.SCB: .*negative"),
        ({"weight_format": torch.tensor(2)}, r"a\.weight_format: .*\[2\].* 0\b"),
        ({"weight_format": torch.zeros(2)}, r"a\.weight_format: .*\[0\.0, 0\.0\]"),
        ({"absmax": torch.ones(8)}, r"a\.weight: .*absmax.*SCB, weight_format"),
    ],
)
def test_damaged_statistics_are_rejected_by_name(change, pattern):
    quantized, scales = quantize(noise(8, 64))
    assert torch.equal(unpack_scales("a.weight", quantized, (8, 64), {"SCB": scales}), scales)
    with pytest.raises(ValueError, match=f"^{pattern}"):
        unpack_scales("a.weight", quantized, (8, 64), {"SCB": scales} | change)


def test_split_key():
    assert split_key("a.b.SCB") == ("a.b.weight", "SCB")
    assert split_key("a.weight_format") == ("a.weight", "weight_format")
    assert split_key("a.weight") is None
    assert split_key("SCB") is None


def load(folder, recipe=None, model_cls=SD3Transformer2DModel, dtype=torch.bfloat16):
    return load_quantized(model_cls, folder, recipe, dtype=dtype, device="cpu")


def folder_of(model_cls, request):
    name = "mini_flux" if model_cls is FluxTransformer2DModel else "mini_sd3"
    return request.getfixturevalue(name) / "transformer"


def bnb_config(recipe):
    return BitsAndBytesConfig(
        load_in_8bit=True,
        llm_int8_threshold=recipe.llm_int8_threshold,
        llm_int8_skip_modules=list(recipe.skip) or None,
        bnb_4bit_compute_dtype=recipe.compute_dtype,
    )


@pytest.mark.parametrize("recipe", [QuantRecipe("int8"), RECIPE, QuantRecipe("int8", llm_int8_threshold=0)])
def test_config_equals_that_of_diffusers_and_reads_back(recipe):
    config = quantization_config(recipe)
    assert json.loads(json.dumps(config)) == json.loads(json.dumps(bnb_config(recipe).to_dict()))
    assert read_quantization_config(config, "config.json") == recipe
    # bitsandbytes ignores this key for int8: products run in the dtype of the unquantized tensors.
    config["bnb_4bit_compute_dtype"] = "float32"
    assert read_quantization_config(config, "config.json") == recipe
    read = read_quantization_config(config, "config.json", dtype=torch.float16)
    assert read == replace(recipe, compute_dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"load_in_4bit": True}, "load_in_4bit.*load_in_8bit"),
        ({"load_in_8bit": False}, "load_in_4bit.*load_in_8bit"),
        ({"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
        ({"llm_int8_threshold": "6"}, "llm_int8_threshold.*'6'"),
        ({"llm_int8_threshold": -1}, "llm_int8_threshold: got -1"),
        ({"llm_int8_threshold": 10**400}, "llm_int8_threshold: got 1000"),
        ({"llm_int8_threshold": float("nan")}, "llm_int8_threshold: got nan"),
    ],
)
def test_unsupported_config_is_rejected(change, pattern):
    with pytest.raises(ValueError, match="^config.json: .*" + pattern):
        read_quantization_config(quantization_config(RECIPE) | change, "config.json")


def test_recipes_that_differ_in_unused_settings_are_equal():
    assert QuantRecipe("int8", double_quant=False) == QuantRecipe("int8")
    assert QuantRecipe("nf4", llm_int8_threshold=1.0) == QuantRecipe("nf4")
    with pytest.raises(ValueError, match=r"^scale_search: got 'mse'.*int8"):
        QuantRecipe("int8", scale_search="mse")


@pytest.mark.parametrize("model_cls", CLASSES)
def test_saved_folder_equals_that_of_diffusers_and_loads_there(model_cls, request, tmp_path):
    folder = folder_of(model_cls, request)
    ours = load(folder, RECIPE, model_cls)
    assert isinstance(ours.transformer_blocks[0].attn.to_q, Linear8bit)
    assert type(ours.proj_out) is nn.Linear
    save_quantized(ours, tmp_path / "ours")
    with stock_bitsandbytes_on_cpu():
        direct = model_cls.from_pretrained(
            folder, torch_dtype=torch.bfloat16, quantization_config=bnb_config(RECIPE)
        )
        direct.save_pretrained(tmp_path / "stock")
        stock, info = model_cls.from_pretrained(
            tmp_path / "ours", torch_dtype=torch.bfloat16, output_loading_info=True
        )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (tmp_path / "ours" / WEIGHTS_FILE).read_bytes() == (tmp_path / "stock" / WEIGHTS_FILE).read_bytes()
    configs = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "stock")]
    configs[1].pop("_name_or_path")
    assert configs[0] == configs[1]
    assert {module.state.threshold for module in stock.modules() if hasattr(module, "state")} == {4.0}
    # On the CPU, bitsandbytes multiplies by the dequantized weight in train mode, and computes LLM.int8() in eval mode.
    stock.eval()
    with torch.no_grad():
        theirs = stock(**inputs(stock))[0]
    expected = prediction(ours)
    assert (theirs - expected).float().norm() / expected.float().norm() < 0.05


@pytest.mark.parametrize("model_cls", CLASSES)
def test_folder_of_bitsandbytes_loads_bitwise_identical(model_cls, request, tmp_path, caplog):
    with stock_bitsandbytes_on_cpu():
        stock = model_cls.from_pretrained(
            folder_of(model_cls, request), torch_dtype=torch.float16, quantization_config=bnb_config(RECIPE)
        )
        stock.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / INDEX_FILE).exists()
    with caplog.at_level(logging.WARNING):
        ours = load(tmp_path, QuantRecipe("int8", skip=("proj_out",), llm_int8_threshold=4.0), model_cls)
    assert not caplog.records
    for path, module in stock.named_modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            layer = ours.get_submodule(path)
            assert torch.equal(layer.weight, module.weight), path
            theirs = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
            torch.testing.assert_close(layer.dequantize(torch.float32), theirs, rtol=3e-7, atol=0)
    assert ours.transformer_blocks[0].attn.to_q.threshold == 4.0
    save_quantized(ours, tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS_FILE)
    expected = {key: tensor.bfloat16() if tensor.dtype == torch.float16 else tensor
                for key, tensor in stock.state_dict().items()}  # fmt: skip
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in expected.items())


def test_folder_with_another_quantization_keeps_it_and_warns(mini_sd3, tmp_path, caplog):
    save_quantized(load(mini_sd3 / "transformer", RECIPE), tmp_path / "q")
    with caplog.at_level(logging.WARNING):
        ours = load(tmp_path / "q", QuantRecipe())
    (record,) = caplog.records
    assert record.args[0] == tmp_path / "q"
    assert "int8" in record.getMessage()
    assert "nf4" in record.getMessage()
    assert isinstance(ours.transformer_blocks[0].attn.to_q, Linear8bit)


def test_error_names_a_damaged_file(mini_sd3, tmp_path):
    save_quantized(load(mini_sd3 / "transformer", RECIPE), tmp_path / "q")
    file = tmp_path / "q" / WEIGHTS_FILE
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith(".SCB"))
    original = tensors.pop(name)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"{WEIGHTS_FILE}: {name}: missing"):
        load(tmp_path / "q")
    save_file(tensors | {name: original[:-1].clone()}, file)
    with pytest.raises(ValueError, match=f"{WEIGHTS_FILE}: {name}: .*torch.float32"):
        load(tmp_path / "q")


def test_saving_with_a_different_recipe_is_rejected(mini_sd3, tmp_path):
    ours = load(mini_sd3 / "transformer", RECIPE)
    for recipe in (
        QuantRecipe(skip=("proj_out",)),
        QuantRecipe("int8", skip=("proj_out",)),
        QuantRecipe("int8"),
    ):
        with pytest.raises(ValueError, match=r"quantized with int8, threshold 4\b|proj_out: not quantized"):
            save_quantized(ours, tmp_path / "q", recipe)
    nf4_model = load(mini_sd3 / "transformer", QuantRecipe(skip=("proj_out",)))
    with pytest.raises(ValueError, match=r"quantized with QuantSpec\(quant_type='nf4'"):
        save_quantized(nf4_model, tmp_path / "q", RECIPE)
    assert list(tmp_path.iterdir()) == []


def test_memory_footprint_includes_the_scales(mini_sd3):
    layer = Linear8bit.from_linear(nn.Linear(128, 128, bias=False), compute_dtype=torch.bfloat16)
    weight = layer.weight
    assert weight.nelement() == 128 * 128 + 4 * 128
    assert weight.numel() == 128 * 128
    ours = load(mini_sd3 / "transformer", RECIPE)
    on_disk = sum(t.nbytes for key, t in ours.state_dict().items() if not key.endswith("weight_format"))
    assert ours.get_memory_footprint() == on_disk


def test_converted_model_is_close_to_the_original(mini_sd3):
    model = SD3Transformer2DModel.from_pretrained(mini_sd3 / "transformer", torch_dtype=torch.bfloat16)
    expected = prediction(model)
    convert(model, QuantRecipe("int8"))
    error = (prediction(model).float() - expected.float()).norm() / expected.float().norm()
    assert 0 < error < 0.05
    with pytest.raises(ValueError, match="no linear layer to quantize"):
        convert(model, QuantRecipe())


def test_adapters_train_on_int8_and_are_not_saved_with_the_base(mini_flux, tmp_path):
    flux = load(mini_flux / "transformer", QuantRecipe("int8"), FluxTransformer2DModel)
    bare = prediction(flux)
    flux.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_mlp", "norm1.linear"]))
    assert isinstance(flux.transformer_blocks[0].attn.to_q.base_layer, Linear8bit)
    assert torch.equal(prediction(flux), bare)
    flux.enable_gradient_checkpointing()
    flux(**inputs(flux))[0].float().square().mean().backward()
    trained_grads = {name: p.grad for name, p in flux.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained_grads)
    assert all(grad.abs().sum() > 0 for name, grad in trained_grads.items() if "lora_B" in name)
    save_quantized(flux, tmp_path / "q")
    assert torch.equal(prediction(load(tmp_path / "q", None, FluxTransformer2DModel)), bare)


def test_get_peft_model_finds_all_layers_and_does_not_merge(mini_sd3):
    model = get_peft_model(
        load(mini_sd3 / "transformer", RECIPE), LoraConfig(r=2, target_modules="all-linear")
    )
    tuned = {name.partition(".lora_A.")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    linears = {name for name, module in model.named_modules() if isinstance(module, Linear8bit)}
    assert linears < {f"{name}.base_layer" for name in tuned}
    with pytest.raises(RuntimeError, match="can't be cast"):
        model.merge_adapter()


@pytest.mark.parametrize("kind", ["flux_mini", "sd3_mini"])
def test_recipe_file_selects_int8_and_its_threshold(kind):
    recipe = load_recipe(RECIPES / f"{kind}.yaml", ["quant.type=int8", "quant.llm_int8_threshold=3"])
    quant = quant_recipe(recipe)
    assert (quant.quant_type, quant.llm_int8_threshold, quant.double_quant) == (
        "int8",
        3.0,
        False,
    )
    with pytest.raises(ValueError, match=r"quant\.scale_search=mse: got mse\b.*int8"):
        load_recipe(RECIPES / f"{kind}.yaml", ["quant.type=int8", "quant.scale_search=mse"])
