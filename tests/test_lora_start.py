"""Adapters that a run starts from: in each form they are the same update, and what does not fit is told how to."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.quant.convert import QuantRecipe
from halfbyte.trainer.adapters import ADAPTER, LoraVariant, add_lora, save_adapter, trained_parameters
from halfbyte.trainer.checkpoint import ADAPTER_FILE
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.lora_formats import FORMATS, write_formats
from halfbyte.trainer.lora_start import read_layers, start_from
from halfbyte.trainer.registry import FAMILIES
from halfbyte.trainer.saved_adapter import read_saved

from probe import prediction
from runs import run_here, write_recipe

FILES = {
    "diffusers": ADAPTER_FILE,
    "PEFT": "adapter_model.safetensors",
    "comfyui": "comfyui/cat.safetensors",
    "kohya": "kohya/cat.safetensors",
}


def adapted(family, *, rank=4, targets="all-linear", seed=0, **variant):
    denoiser = family.load_denoiser(QuantRecipe("nf4"), device=torch.device("cpu"), dtype=torch.float32)
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
    save_file({"unet.a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "one.safetensors")
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
