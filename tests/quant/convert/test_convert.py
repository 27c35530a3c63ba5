"""Tests which layers are quantized, against diffusers' own quantizer, and the checks of recipes and skip lists."""

import copy
import logging

import bitsandbytes as bnb
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear
from peft import LoraConfig
from torch import nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.convert.replace_linears import convert
from halfbyte.quant.convert.skip_list import SkipListError, kept_in_fp32, skip_matches
from halfbyte.quant.layers.linear4bit import Linear4bit

from probe import prediction

CLASSES = [FluxTransformer2DModel, SD3Transformer2DModel]


def model_on_meta(model_cls, request):
    folder = request.getfixturevalue(
        {"FluxTransformer2DModel": "mini_flux"}.get(model_cls.__name__, "mini_sd3")
    )
    with init_empty_weights():
        return model_cls.from_config(model_cls.load_config(folder / "transformer"))


@pytest.mark.parametrize("model_cls", CLASSES)
@pytest.mark.parametrize(
    "skip",
    [
        (),
        ("proj_out",),
        ("norm_out",),
        ("to_q", "context_embedder"),
        ("transformer_blocks",),
        ("transformer_blocks.0",),
        ("transformer_blocks.1.attn.to_k",),
        ("attn.to_k",),
        ("out",),
        ("linear",),
        ("0",),
        ("time_text_embed", "ff"),
        ("former_blocks.1",),
    ],
)
def test_skip_list_selects_the_same_layers_as_in_diffusers(model_cls, skip, request):
    ours, theirs = model_on_meta(model_cls, request), model_on_meta(model_cls, request)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=list(skip)
    )
    replace_with_bnb_linear(theirs, modules_to_not_convert=list(skip), quantization_config=config)
    expected = {path for path, module in theirs.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    converted = convert(ours, QuantRecipe(skip=skip), check_skip=False)
    assert set(converted) == expected
    assert {path for path, module in ours.named_modules() if isinstance(module, Linear4bit)} == expected


def test_modules_kept_in_fp32_are_skipped():
    class Kept(nn.Module):
        _keep_in_fp32_modules = ("scale",)

        def __init__(self):
            super().__init__()
            self.scale, self.body = nn.Linear(64, 64), nn.Linear(64, 64)

    assert convert(Kept(), QuantRecipe()) == ("body",)
    Kept._keep_in_fp32_modules = "body"
    assert kept_in_fp32(Kept) == ("body",)
    assert convert(Kept(), QuantRecipe()) == ("scale",)


def test_skip_matches_counts_layers_and_parameters(request):
    model = model_on_meta(FluxTransformer2DModel, request)
    (match,) = skip_matches(model, ("proj_out",))
    singles = [
        f"single_transformer_blocks.{block}.proj_out" for block in range(model.config.num_single_layers)
    ]
    assert sorted(match.layers) == sorted(["proj_out", *singles])
    assert match.parameters == sum(model.get_submodule(path).weight.numel() for path in match.layers)


def test_entry_that_matches_layers_outside_its_module_warns(request, caplog):
    with caplog.at_level(logging.WARNING):
        convert(model_on_meta(FluxTransformer2DModel, request), QuantRecipe(skip=("proj_out",)))
    (record,) = caplog.records
    assert record.getMessage().startswith("skip: 'proj_out'")
    first_other = "single_transformer_blocks.0.proj_out"
    assert record.args == ("proj_out", 3, "FluxTransformer2DModel", "45,056", 2, first_other)


@pytest.mark.parametrize("skip", [("proj_out",), ("norm_out", "to_q"), ("transformer_blocks.0",)])
def test_entry_that_matches_only_its_module_does_not_warn(skip, request, caplog):
    with caplog.at_level(logging.WARNING):
        convert(model_on_meta(SD3Transformer2DModel, request), QuantRecipe(skip=skip))
    assert not caplog.records


def test_entry_that_matches_nothing_is_rejected_with_a_suggestion(request):
    with pytest.raises(
        SkipListError, match=r"^skip: got 'projout'.* SD3Transformer2DModel.*did you mean 'proj_out'"
    ):
        convert(model_on_meta(SD3Transformer2DModel, request), QuantRecipe(skip=("projout",)))


def test_model_with_values_is_quantized_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 8, bias=False)).bfloat16()
    weight = model[0].weight.detach().clone()
    assert convert(model, QuantRecipe(quant_type="fp4", double_quant=False, compute_dtype=torch.float32)) == (
        "0",
        "2",
    )
    layer = model[0]
    assert (layer.spec.quant_type, layer.spec.double_quant) == ("fp4", False)
    assert layer.compute_dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())
    error = (layer.dequantize().float() - weight.float()).norm() / weight.float().norm()
    assert 0.05 < error < 0.2
    assert model(torch.ones(2, 64, dtype=torch.bfloat16)).isfinite().all()


def test_converted_model_is_close_to_the_original(mini_sd3):
    model = SD3Transformer2DModel.from_pretrained(mini_sd3 / "transformer", torch_dtype=torch.bfloat16)
    expected = prediction(model)
    convert(model, QuantRecipe())
    error = (prediction(model).float() - expected.float()).norm() / expected.float().norm()
    assert 0 < error < 0.5


def test_converting_twice_is_rejected():
    model = nn.Sequential(nn.Linear(64, 64))
    convert(model, QuantRecipe())
    with pytest.raises(ValueError, match=r"^Sequential: no linear layer"):
        convert(model, QuantRecipe())


def test_error_names_the_path_of_a_bad_weight():
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^0\.weight: .*NaN"):
        convert(model, QuantRecipe())


def test_model_with_adapters_is_rejected(mini_sd3):
    model = SD3Transformer2DModel.from_pretrained(mini_sd3 / "transformer")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"^SD3Transformer2DModel: .*adapters"):
        convert(model, QuantRecipe())


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"quant_type": "int4"}, "quant_type: got 'int4'"),
        ({"blocksize": 65}, "blocksize: got 65"),
        ({"compute_dtype": torch.float64}, "compute_dtype: got torch.float64"),
        ({"skip": "proj_out"}, "skip: got 'proj_out'"),
        ({"skip": ("",)}, r"skip: got \('',\)"),
    ],
)
def test_recipe_rejects_invalid_settings(settings, pattern):
    with pytest.raises(ValueError, match=f"^{pattern}"):
        QuantRecipe(**settings)


def test_recipes_compare_and_copy_by_value():
    recipe = QuantRecipe(skip=["proj_out"])
    assert recipe == copy.deepcopy(recipe) == QuantRecipe(skip=("proj_out",))
    assert len({recipe, QuantRecipe()}) == 2
