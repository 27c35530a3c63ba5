"""Adapters that a run starts from: every format gives the same update, and errors name the setting."""

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
    """The family, the files of an adapter with an effect, and the model's prediction with it."""
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
def test_every_format_gives_the_same_update(trained, form):
    family, folder, expected = trained
    denoiser = adapted(family, rank=6, seed=7)
    bare = prediction(denoiser, torch.float32)
    layers = read_layers(folder / FILES[form], family.original_names())
    assert not start_from(denoiser, layers, ADAPTER, folder)
    started = prediction(denoiser, torch.float32)
    assert (bare - expected).norm() / expected.norm() > 1e-2
    assert (started - expected).norm() / expected.norm() < 1e-5


def test_a_rank_that_is_too_low_names_the_one_needed(trained):
    family, folder, _ = trained
    layers = read_layers(folder, family.original_names())
    with pytest.raises(RecipeError, match=r"rank 4 .* 3 in this run.* lora\.rank: 4"):
        start_from(adapted(family, rank=3), layers, ADAPTER, folder)


def test_targets_that_are_missing_name_the_ones_needed(trained):
    family, folder, _ = trained
    layers = read_layers(folder, family.original_names())
    with pytest.raises(
        RecipeError, match=r"layers that lora\.targets does not .*lora\.targets: \[.*attn\.to_q"
    ):
        start_from(adapted(family, targets="attention"), layers, ADAPTER, folder)


def test_an_adapter_of_another_model_is_named(trained, mini_flux, mini_sd3):
    family, folder, _ = trained
    other = FAMILIES["sd3"].open(str(mini_sd3), None, None)
    if type(family) is type(other):
        other = FAMILIES["flux"].open(str(mini_flux), None, None)
    with pytest.raises(RecipeError, match=r"another base: .*lora_unet_"):
        read_layers(folder / FILES["kohya"], other.original_names())
    layers = read_layers(folder, other.original_names())
    with pytest.raises(RecipeError, match="another base"):
        start_from(adapted(other), layers, ADAPTER, folder)


def test_files_that_are_not_adapters_are_refused(trained, tmp_path):
    family, folder, _ = trained
    names = family.original_names()
    with pytest.raises(RecipeError, match="safetensors"):
        read_layers(tmp_path, names)
    save_file({"model.weight": torch.zeros(2, 2)}, tmp_path / "one.safetensors")
    with pytest.raises(RecipeError, match=r"holds model\.weight\b.*accepted: .*lora_A"):
        read_layers(tmp_path, names)
    both = {f"unet.a.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    save_file(both, tmp_path / "one.safetensors")
    with pytest.raises(RecipeError, match=r"holds unet\.a\.lora_A\.weight\b.*accepted: .*diffusers"):
        read_layers(tmp_path, names)
    tensors = load_file(folder / FILES["kohya"])
    tensors.pop(next(name for name in tensors if "lora_up" in name))
    save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(RecipeError, match=r"lora_B \(up\) none"):
        read_layers(tmp_path, names)
    save_file(load_file(folder / FILES["PEFT"]), tmp_path / "one.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    with pytest.raises(RecipeError, match="peft_type LORA"):
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
    ("change", "config", "reason"),
    [
        ({B: None}, {}, f"{PLACE} .*lora_B .up. none"),
        ({A: None}, {}, f"{PLACE} .*lora_A .down. none"),
        ({A: torch.ones(2, 64)}, {}, r"rank: got .*\(2, 64\).*\(64, 4\)"),
        ({A: torch.ones(4, 64, 1)}, {}, r"\(4, 64, 1\)"),
        ({A: torch.ones(0, 64), B: torch.ones(64, 0)}, {}, r"\(0, 64\)"),
        ({A: torch.full((4, 64), torch.nan)}, {}, f"base_model.model.{A} .*not finite"),
        ({B: torch.full((64, 4), torch.inf)}, {}, f"base_model.model.{B} .*not finite"),
        (
            {f"{PLACE}.lora_B.bias": torch.ones(64)},
            {},
            r"holds base_model\.model\..*lora_B\.bias\b.*accepted",
        ),
        (
            {"proj_out.weight": torch.ones(64, 64)},
            {},
            r"holds base_model\.model\.proj_out\.weight\b.*accepted",
        ),
        ({f"{PLACE}.lora_magnitude_vector": torch.ones(3)}, {}, r"DoRA .* shape \(3,\)"),
        ({A: None, B: None}, {}, r"adapter_model\.safetensors .*no adapter"),
        ({}, {"lora_alpha": None}, "adapter_config.json .*lora_alpha None, expected a number"),
        ({}, {"lora_alpha": "8"}, "lora_alpha '8', expected a number"),
        ({}, {"lora_alpha": True}, "lora_alpha True, expected a number"),
        ({}, {"alpha_pattern": {"(": 1}}, r"alpha_pattern '\(', .*regular expression"),
        ({}, {"alpha_pattern": {"to_q": "x"}}, "alpha_pattern 'to_q' 'x', expected a number"),
        ({}, {"alpha_pattern": [1]}, r"alpha_pattern \[1\]"),
        ({}, {"use_dora": True}, "use_dora"),
    ],
)
def test_a_broken_peft_adapter_is_refused(flux_layers, tmp_path, change, config, reason):
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in (halves("") | change).items() if tensor is not None}
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, file)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    with pytest.raises(RecipeError, match=reason) as caught:
        read_layers(file, flux_layers)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("{", "JSON"),
        ("", "JSON"),
        ("[1]", r"is \[1\]"),
        ("{}", "lora_alpha None"),
        ('{"text_encoder.lora_alpha": 8}', "lora_alpha None"),
        ('{"transformer.lora_alpha": "x"}', "lora_alpha 'x'"),
    ],
)
def test_broken_diffusers_settings_are_refused(flux_layers, tmp_path, settings, reason):
    file = tmp_path / "cat.safetensors"
    save_file(halves("transformer."), file, metadata={"lora_adapter_metadata": settings})
    with pytest.raises(RecipeError, match=rf"cat\.safetensors: .*metadata .*{reason}"):
        read_layers(file, flux_layers)


def test_an_alpha_of_two_values_is_refused(flux_layers, tmp_path):
    names = ("lora_down.weight", "lora_up.weight")
    alphas = {f"diffusion_model.{PLACE}.alpha": torch.ones(2)}
    save_file(halves("diffusion_model.", names=names) | alphas, tmp_path / "cat.safetensors")
    with pytest.raises(RecipeError, match=r"alpha of .* 2 values"):
        read_layers(tmp_path, flux_layers)


def test_a_file_cannot_mix_formats(flux_layers, tmp_path):
    both = halves("diffusion_model.") | halves("transformer.")
    save_file(both, tmp_path / "cat.safetensors")
    with pytest.raises(RecipeError, match=r"holds (diffusion_model|transformer)\..*accepted"):
        read_layers(tmp_path, flux_layers)


def test_an_untrained_fused_adapter_can_be_read(flux_layers, tmp_path):
    """B is all zeros, but the parts of a fused layer are normally separated by the nonzero rows of B."""
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{key}.lora_down.weight": torch.ones(4, 64), f"{key}.lora_up.weight": torch.zeros(192, 4)}
    save_file(tensors, tmp_path / "cat.safetensors")
    layers = read_layers(tmp_path, flux_layers)
    assert layers.keys() == {f"transformer_blocks.0.attn.to_{kind}" for kind in "qkv"}
    assert not any(layer.up.any() for layer in layers.values())


def test_text_encoder_adapters_do_not_change_the_scale(mini_flux, flux_layers, tmp_path):
    """The file is written by stock diffusers, with adapters for the transformer and CLIP, and other alphas
    than ranks."""
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


def test_a_broken_adapter_is_refused_before_the_base_is_loaded(mini_flux, tmp_path):
    save_file(halves("transformer.") | {"transformer.x.weight": torch.ones(1)}, tmp_path / "cat.safetensors")
    recipe = write_recipe(tmp_path, mini_flux)
    with pytest.raises(RecipeError, match=r"lora\.init_from: .*cat\.safetensors .*transformer\.x\.weight"):
        run_here(recipe, f"lora.init_from={tmp_path / 'cat.safetensors'}")
    assert not (tmp_path / "cache").exists(), "something was encoded or quantized"


def test_a_run_starts_from_another_run(mini_flux, tmp_path):
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


def test_dora_starts_with_its_magnitudes(mini_flux, tmp_path):
    quick = ("sample.prompts=[]", "output.export_base=false", "train.steps=1", "train.grad_accumulation=1")
    first = run_here(write_recipe(tmp_path, mini_flux), *quick, "optimizer.lr=0.05", "lora.dora=true")
    recipe = write_recipe(tmp_path, mini_flux, name="again")
    again = run_here(recipe, *quick, f"lora.init_from={first}", "optimizer.lr=1e-9", "lora.dora=true")
    one, other = (load_file(run / "adapter" / ADAPTER_FILE) for run in (first, again))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    plain = write_recipe(tmp_path, mini_flux, name="plain")
    with pytest.raises(RecipeError, match=r"DoRA.*lora\.dora: true"):
        run_here(plain, *quick, f"lora.init_from={first}")
