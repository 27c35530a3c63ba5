"""Adapters that a run starts from: in each form they are the same update, and what does not fit is told how to."""

import json

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer as PeftLayer
from safetensors.torch import load_file, save_file

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.trainer.adapters.formats import FORMATS, write_formats
from halfbyte.trainer.adapters.lora import (
    ADAPTER,
    LoraVariant,
    add_lora,
    save_adapter,
    start_from,
    trained_parameters,
)
from halfbyte.trainer.adapters.read import read_layers
from halfbyte.trainer.adapters.saved import ADAPTER_FILE, read_saved
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.catalog import FAMILIES

from probe import prediction
from runs import run_here, write_recipe

FILES = {
    "diffusers": ADAPTER_FILE,
    "PEFT": "adapter_model.safetensors",
    "comfyui": "comfyui/cat.safetensors",
    "kohya": "kohya/cat.safetensors",
}


def adapted(family, *, rank=4, targets="all-linear", seed=0, **variant):
    denoiser = load_base(family, QuantRecipe("nf4"), device=torch.device("cpu"), dtype=torch.float32)
    add_lora(
        denoiser,
        rank=rank,
        alpha=8,
        dropout=0.0,
        targets=family.lora_targets(targets),
        init="gaussian",
        seed=seed,
        variant=LoraVariant(**variant),
    )
    return denoiser


@pytest.fixture(scope="module", params=["flux", "sd3"])
def trained(request, tmp_path_factory):
    """The family, the files of an adapter that does something, and its prediction."""
    model = request.getfixturevalue(f"mini_{request.param}")
    family = FAMILIES[request.param].open(str(model), None, None)
    denoiser = adapted(family, rslora=True, rank_pattern={"to_k": 2}, alpha_pattern={"to_v": 3.0})
    draws = torch.Generator().manual_seed(1)
    for name, parameter in trained_parameters(denoiser).items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=draws)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(denoiser, family.pipeline_class, str(folder))
    write_formats(
        read_saved(folder / ADAPTER_FILE), FORMATS, folder, family.original_names(), name="cat", base=None
    )
    return family, folder, prediction(denoiser, torch.float32)


@pytest.mark.parametrize("form", FILES)
def test_every_form_is_the_same_update(trained, form):
    family, folder, expected = trained
    denoiser = adapted(family, rank=6, seed=7)
    bare = prediction(denoiser, torch.float32)
    layers = read_layers(folder / FILES[form], family.original_names())
    assert not start_from(denoiser, layers, ADAPTER, folder)
    started = prediction(denoiser, torch.float32)
    assert (bare - expected).norm() / expected.norm() > 1e-2
    assert (started - expected).norm() / expected.norm() < 1e-5


def test_a_rank_that_does_not_fit_says_which_would(trained):
    family, folder, _ = trained
    layers = read_layers(folder, family.original_names())
    with pytest.raises(RecipeError, match=r"has rank 4 .* and 3 in this run; set lora\.rank: 4"):
        start_from(adapted(family, rank=3), layers, ADAPTER, folder)


def test_targets_that_do_not_fit_say_which_would(trained):
    family, folder, _ = trained
    layers = read_layers(folder, family.original_names())
    with pytest.raises(
        RecipeError, match=r"that lora\.targets does not, first .*set lora\.targets: \[.*attn\.to_q"
    ):
        start_from(adapted(family, targets="attention"), layers, ADAPTER, folder)


def test_an_adapter_of_another_model_is_named(trained, mini_flux, mini_sd3):
    family, folder, _ = trained
    other = FAMILIES["sd3"].open(str(mini_sd3), None, None)
    if type(family) is type(other):
        other = FAMILIES["flux"].open(str(mini_flux), None, None)
    with pytest.raises(RecipeError, match="another base: the model has no"):
        read_layers(folder / FILES["kohya"], other.original_names())
    layers = read_layers(folder, other.original_names())
    with pytest.raises(RecipeError, match="another base"):
        start_from(adapted(other), layers, ADAPTER, folder)


def test_what_is_no_adapter_is_named(trained, tmp_path):
    family, folder, _ = trained
    names = family.original_names()
    with pytest.raises(RecipeError, match="no safetensors file"):
        read_layers(tmp_path, names)
    save_file({"model.weight": torch.zeros(2, 2)}, tmp_path / "one.safetensors")
    with pytest.raises(RecipeError, match=r"holds model\.weight; accepted: LoRA alone"):
        read_layers(tmp_path, names)
    both = {f"unet.a.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    save_file(both, tmp_path / "one.safetensors")
    with pytest.raises(RecipeError, match=r"holds unet\.a\.lora_A\.weight; accepted: the keys of diffusers"):
        read_layers(tmp_path, names)
    tensors = load_file(folder / FILES["kohya"])
    tensors.pop(next(name for name in tensors if "lora_up" in name))
    save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(RecipeError, match="not both halves"):
        read_layers(tmp_path, names)
    save_file(load_file(folder / FILES["PEFT"]), tmp_path / "one.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    with pytest.raises(RecipeError, match="describes no LoRA"):
        read_layers(tmp_path, names)


PLACE = "transformer_blocks.0.attn.to_q"
CONFIG = {"peft_type": "LORA", "lora_alpha": 8, "r": 4}


def halves(prefix, rank=4, names=("lora_A.weight", "lora_B.weight")):
    return {
        f"{prefix}{PLACE}.{names[0]}": torch.ones(rank, 64),
        f"{prefix}{PLACE}.{names[1]}": torch.ones(64, rank),
    }


@pytest.fixture(scope="module")
def flux_layers(mini_flux):
    return FAMILIES["flux"].open(str(mini_flux), None, None).original_names()


A, B = f"{PLACE}.lora_A.weight", f"{PLACE}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        ({B: None}, {}, f"{PLACE} has not both halves .*lora_B .up. none"),
        ({A: None}, {}, f"{PLACE} has not both halves .*lora_A .down. none"),
        ({A: torch.ones(2, 64)}, {}, r"of one rank: got .*\(2, 64\).*\(64, 4\)"),
        ({A: torch.ones(4, 64, 1)}, {}, r"\(4, 64, 1\)"),
        ({A: torch.ones(0, 64), B: torch.ones(64, 0)}, {}, r"\(0, 64\)"),
        ({A: torch.full((4, 64), torch.nan)}, {}, f"base_model.model.{A} holds values that are not finite"),
        ({B: torch.full((64, 4), torch.inf)}, {}, f"base_model.model.{B} holds values that are not finite"),
        ({f"{PLACE}.lora_B.bias": torch.ones(64)}, {}, r"holds base_model\.model\..*lora_B\.bias; accepted"),
        ({"proj_out.weight": torch.ones(64, 64)}, {}, r"holds base_model\.model\.proj_out\.weight; accepted"),
        ({f"{PLACE}.lora_magnitude_vector": torch.ones(3)}, {}, r"lengths of .* shape \(3,\)"),
        ({A: None, B: None}, {}, "holds no adapter"),
        ({}, {"lora_alpha": None}, "adapter_config.json has lora_alpha None, expected a number"),
        ({}, {"lora_alpha": "8"}, "lora_alpha '8', expected a number"),
        ({}, {"lora_alpha": True}, "lora_alpha True, expected a number"),
        ({}, {"alpha_pattern": {"(": 1}}, r"alpha_pattern '\(', which is no regular expression"),
        ({}, {"alpha_pattern": {"to_q": "x"}}, "alpha_pattern 'to_q' 'x', expected a number"),
        ({}, {"alpha_pattern": [1]}, r"alpha_pattern \[1\]"),
        ({}, {"use_dora": True}, "use_dora"),
    ],
)
def test_a_broken_adapter_of_peft_is_told(flux_layers, tmp_path, change, config, said):
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in (halves("") | change).items() if tensor is not None}
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, file)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    with pytest.raises(RecipeError, match=said) as told:
        read_layers(file, flux_layers)
    assert str(tmp_path) in str(told.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[1]", r"is \[1\]"),
        ("{}", "lora_alpha None"),
        ('{"text_encoder.lora_alpha": 8}', "lora_alpha None"),
        ('{"transformer.lora_alpha": "x"}', "lora_alpha 'x'"),
    ],
)
def test_broken_settings_of_diffusers_are_told(flux_layers, tmp_path, settings, said):
    file = tmp_path / "cat.safetensors"
    save_file(halves("transformer."), file, metadata={"lora_adapter_metadata": settings})
    with pytest.raises(RecipeError, match=rf"cat\.safetensors: its metadata .*{said}"):
        read_layers(file, flux_layers)


def test_an_alpha_of_two_values_is_told(flux_layers, tmp_path):
    names = ("lora_down.weight", "lora_up.weight")
    alphas = {f"diffusion_model.{PLACE}.alpha": torch.ones(2)}
    save_file(halves("diffusion_model.", names=names) | alphas, tmp_path / "cat.safetensors")
    with pytest.raises(RecipeError, match=r"the alpha of .* has 2 values"):
        read_layers(tmp_path, flux_layers)


def test_forms_do_not_mix_in_a_file(flux_layers, tmp_path):
    both = halves("diffusion_model.") | halves("transformer.")
    save_file(both, tmp_path / "cat.safetensors")
    with pytest.raises(RecipeError, match=r"holds (diffusion_model|transformer)\..*one of them in a file"):
        read_layers(tmp_path, flux_layers)


def test_an_adapter_that_has_not_learned_is_one_all_the_same(flux_layers, tmp_path):
    """All that it has are layers that fuse, whose parts are told from each other by what is not zero."""
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{key}.lora_down.weight": torch.ones(4, 64), f"{key}.lora_up.weight": torch.zeros(192, 4)}
    save_file(tensors, tmp_path / "cat.safetensors")
    layers = read_layers(tmp_path, flux_layers)
    assert layers.keys() == {f"transformer_blocks.0.attn.to_{kind}" for kind in "qkv"}
    assert not any(layer.up.any() for layer in layers.values())


def test_text_encoders_beside_leave_the_scale_as_it_is(mini_flux, flux_layers, tmp_path):
    """A file as stock diffusers writes it, of transformer and CLIP, whose alpha is not its rank."""
    pipeline = FluxPipeline.from_pretrained(mini_flux)
    parts = {"transformer": (pipeline.transformer, "to_q"), "text_encoder": (pipeline.text_encoder, "q_proj")}
    for alpha, (model, target) in zip((16, 2), parts.values(), strict=True):
        model.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=[target], init_lora_weights=False))
    FluxPipeline.save_lora_weights(
        tmp_path,
        **{f"{part}_lora_layers": get_peft_model_state_dict(model) for part, (model, _) in parts.items()},
        **_collate_lora_metadata({part: model for part, (model, _) in parts.items()}),
    )
    scales = {path: layer.scale for path, layer in read_layers(tmp_path, flux_layers).items()}
    stock = FluxPipeline.from_pretrained(mini_flux)
    stock.load_lora_weights(tmp_path, adapter_name="both")
    expected = {
        name: module.scaling["both"]
        for name, module in stock.transformer.named_modules()
        if isinstance(module, PeftLayer)
    }
    assert scales == expected
    assert set(expected.values()) == {4.0}


def test_a_broken_adapter_is_told_ahead_of_the_base(mini_flux, tmp_path):
    save_file(halves("transformer.") | {"transformer.x.weight": torch.ones(1)}, tmp_path / "cat.safetensors")
    recipe = write_recipe(tmp_path, mini_flux)
    with pytest.raises(
        RecipeError, match=r"lora\.init_from: .*cat\.safetensors holds transformer\.x\.weight"
    ):
        run_here(recipe, f"lora.init_from={tmp_path / 'cat.safetensors'}")
    assert not (tmp_path / "cache").exists(), "nothing was encoded or quantized"


def test_a_run_starts_from_another_one(mini_flux, tmp_path):
    quick = ("sample.prompts=[]", "output.export_base=false", "train.steps=1", "train.grad_accumulation=1")
    first = run_here(write_recipe(tmp_path, mini_flux), *quick, "optimizer.lr=0.05")
    again = run_here(
        write_recipe(tmp_path, mini_flux, name="again"),
        *quick,
        f"lora.init_from={first}",
        "optimizer.lr=1e-9",
    )
    one, other = (load_file(run / "adapter" / ADAPTER_FILE) for run in (first, again))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_dora_brings_its_lengths(mini_flux, tmp_path):
    quick = ("sample.prompts=[]", "output.export_base=false", "train.steps=1", "train.grad_accumulation=1")
    first = run_here(write_recipe(tmp_path, mini_flux), *quick, "optimizer.lr=0.05", "lora.dora=true")
    recipe = write_recipe(tmp_path, mini_flux, name="again")
    again = run_here(recipe, *quick, f"lora.init_from={first}", "optimizer.lr=1e-9", "lora.dora=true")
    one, other = (load_file(run / "adapter" / ADAPTER_FILE) for run in (first, again))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    plain = write_recipe(tmp_path, mini_flux, name="plain")
    with pytest.raises(RecipeError, match=r"a DoRA adapter; set lora\.dora: true"):
        run_here(plain, *quick, f"lora.init_from={first}")
