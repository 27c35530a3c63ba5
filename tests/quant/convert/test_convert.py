"""Which layers become 4-bit layers: diffusers' own quantizer is asked, and must name the same ones."""

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
from halfbyte.quant.convert.skip_list import kept_in_fp32, skip_matches
from halfbyte.quant.layers.linear4bit import Linear4bit

from probe import prediction

CLASSES = [FluxTransformer2DModel, SD3Transformer2DModel]


def on_meta(model_cls, request):
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
def test_a_skip_list_means_the_same_layers_as_to_diffusers(model_cls, skip, request):
    ours, theirs = on_meta(model_cls, request), on_meta(model_cls, request)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=list(skip)
    )
    replace_with_bnb_linear(theirs, modules_to_not_convert=list(skip), quantization_config=config)
    expected = {path for path, module in theirs.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    converted = convert(ours, QuantRecipe(skip=skip), check_skip=False)
    assert set(converted) == expected
    assert {path for path, module in ours.named_modules() if isinstance(module, Linear4bit)} == expected


def test_names_kept_in_fp32_count_as_skipped():
    class Kept(nn.Module):
        _keep_in_fp32_modules = ("scale",)

        def __init__(self):
            super().__init__()
            self.scale, self.body = nn.Linear(64, 64), nn.Linear(64, 64)

    assert convert(Kept(), QuantRecipe()) == ("body",)
    Kept._keep_in_fp32_modules = "body"
    assert kept_in_fp32(Kept) == ("body",)
    assert convert(Kept(), QuantRecipe()) == ("scale",)


def test_what_each_entry_skips_is_counted(request):
    model = on_meta(FluxTransformer2DModel, request)
    (match,) = skip_matches(model, ("proj_out",))
    singles = [
        f"single_transformer_blocks.{block}.proj_out" for block in range(model.config.num_single_layers)
    ]
    assert sorted(match.layers) == sorted(["proj_out", *singles])
    assert match.parameters == sum(model.get_submodule(path).weight.numel() for path in match.layers)


def test_a_name_that_matches_more_than_its_module_is_warned_about(request, caplog):
    with caplog.at_level(logging.WARNING):
        convert(on_meta(FluxTransformer2DModel, request), QuantRecipe(skip=("proj_out",)))
    (record,) = caplog.records
    message = record.getMessage()
    assert "'proj_out' matches 5 linear layers of FluxTransformer2DModel" in message
    assert "(86,016 parameters stay unquantized)" in message
    assert "4 besides the module of that path, single_transformer_blocks.0.proj_out first" in message


@pytest.mark.parametrize("skip", [("proj_out",), ("norm_out", "to_q"), ("transformer_blocks.0",)])
def test_a_name_that_means_what_it_says_is_not(skip, request, caplog):
    with caplog.at_level(logging.WARNING):
        convert(on_meta(SD3Transformer2DModel, request), QuantRecipe(skip=skip))
    assert not caplog.records


def test_an_entry_that_matches_nothing_is_refused_with_a_suggestion(request):
    with pytest.raises(
        ValueError, match=r"'projout', which matches no linear layer .* did you mean 'proj_out'"
    ):
        convert(on_meta(SD3Transformer2DModel, request), QuantRecipe(skip=("projout",)))


def test_a_model_with_values_is_quantized_in_place():
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


def test_a_converted_model_stays_near_the_model(mini_sd3):
    model = SD3Transformer2DModel.from_pretrained(mini_sd3 / "transformer", torch_dtype=torch.bfloat16)
    expected = prediction(model)
    convert(model, QuantRecipe())
    error = (prediction(model).float() - expected.float()).norm() / expected.float().norm()
    assert 0 < error < 0.5


def test_converting_twice_finds_nothing_left():
    model = nn.Sequential(nn.Linear(64, 64))
    convert(model, QuantRecipe())
    with pytest.raises(ValueError, match="Sequential: no linear layer to quantize"):
        convert(model, QuantRecipe())


def test_a_bad_weight_is_named_by_its_path():
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^0\.weight: .*NaN"):
        convert(model, QuantRecipe())


def test_a_model_with_adapters_is_refused(mini_sd3):
    model = SD3Transformer2DModel.from_pretrained(mini_sd3 / "transformer")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="adapters already"):
        convert(model, QuantRecipe())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_type": "int4"}, "quant_type: got 'int4'"),
        ({"blocksize": 65}, "blocksize: got 65"),
        ({"compute_dtype": torch.float64}, "compute_dtype: got torch.float64"),
        ({"skip": "proj_out"}, "skip: got 'proj_out', expected a list"),
        ({"skip": ("",)}, "expected a list of module names"),
    ],
)
def test_a_recipe_names_what_it_accepts(settings, words):
    with pytest.raises(ValueError, match=words):
        QuantRecipe(**settings)


def test_recipes_compare_and_copy_by_value():
    recipe = QuantRecipe(skip=["proj_out"])
    assert recipe == copy.deepcopy(recipe) == QuantRecipe(skip=("proj_out",))
    assert len({recipe, QuantRecipe()}) == 2
