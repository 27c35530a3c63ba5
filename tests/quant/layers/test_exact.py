"""Tests layers that multiply by an exact weight, while saved files, and so diffusers, contain the packed one."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from rich.console import Console
from safetensors.torch import load_file
from torch.nn import functional as F

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.layers.exact import EXACT_FILE, exact_weights, hold_exact
from halfbyte.quant.load.serialize import save_quantized
from halfbyte.quant.load.transformer import load_quantized
from halfbyte.trainer.denoiser.load import load_denoiser
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.plan.dry_run import DryRun
from halfbyte.trainer.quantize.run import quantize
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.runtime.world import read_world

from runs import run_here, write_recipe

SINGLE_PROCESS = read_world({"ACCELERATE_USE_CPU": "true"})
WEIGHTS = "diffusion_pytorch_model.safetensors"


def load(folder, quant_type="nf4", **settings):
    recipe = QuantRecipe(quant_type, compute_dtype=torch.float32, **settings)
    return load_quantized(FluxTransformer2DModel, folder, recipe, dtype=torch.float32, device="cpu")


def weights_of(mini_flux):
    return load_file(mini_flux / "transformer" / WEIGHTS)


def hold_exact_layers(model, mini_flux, *paths):
    hold_exact(model, paths, weights_of(mini_flux).__getitem__)


def loaded(recipe, *overrides):
    recipe = load_recipe(recipe, overrides)
    model = recipe.model
    family = Flux.open(model.path, None, model.max_sequence_length, model.transformer)
    return load_denoiser(recipe, family, SINGLE_PROCESS, Console(quiet=True)).denoiser


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_output_and_gradient_use_the_exact_weight(mini_flux, quant_type):
    model = load(mini_flux / "transformer", quant_type)
    layer = model.proj_out
    weight = weights_of(mini_flux)["proj_out.weight"].float()
    x = torch.randn(5, layer.in_features, requires_grad=True)
    packed = layer(x)
    hold_exact_layers(model, mini_flux, "proj_out")
    expected = F.linear(x, weight, layer.bias)
    assert torch.equal(layer(x), expected)
    assert not torch.allclose(packed, expected, rtol=1e-3)
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.equal(found, wanted)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_saved_files_do_not_change(mini_flux, tmp_path):
    model = load(mini_flux / "transformer")
    save_quantized(model, tmp_path / "packed")
    hold_exact_layers(model, mini_flux, "proj_out")
    save_quantized(model, tmp_path / "exact")
    before, after = (load_file(tmp_path / kind / WEIGHTS) for kind in ("packed", "exact"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_exact_weight_moves_with_the_model(mini_flux):
    model = load(mini_flux / "transformer")
    hold_exact_layers(model, mini_flux, "proj_out")
    assert model.to("meta").proj_out.exact.is_meta


def test_weights_of_unquantized_layers_are_not_read(mini_flux):
    model = load(mini_flux / "transformer", skip=("x_embedder",))
    hold_exact(model, ["x_embedder"], lambda _: pytest.fail("it was read"))


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        ("proj_ou", "no linear layer of FluxTransformer2DModel; .*; did you mean 'proj_out'"),
        ("transformer_blocks", "no linear layer"),
        ("single_transformer_blocks.0.proj_out", "in a block"),
    ],
)
def test_invalid_paths_are_rejected(mini_flux, path, pattern):
    with pytest.raises(ValueError, match=f"^got '{path}'.*{pattern}"):
        hold_exact_layers(load(mini_flux / "transformer"), mini_flux, path)


def test_weights_of_the_wrong_shape_are_rejected(mini_flux):
    with pytest.raises(ValueError, match=r"^proj_out: .*shape.*\(3, 4\)"):
        hold_exact(load(mini_flux / "transformer"), ["proj_out"], lambda _: torch.zeros(3, 4))


def test_quantize_writes_the_exact_weight_that_runs_load(mini_flux, tmp_path):
    recipe = write_recipe(tmp_path, mini_flux)
    exact = "quant.exact=[proj_out]"
    made = quantize(
        load_recipe(recipe, [exact]), tmp_path / "made", 0, SINGLE_PROCESS, Console(quiet=True)
    ).folder
    weight = weights_of(mini_flux)["proj_out.weight"].float()
    assert load_file(made / EXACT_FILE).keys() == {"proj_out.weight"}
    for source in ((), (f"model.transformer={made}",)):
        layer = loaded(recipe, exact, *source).proj_out
        assert torch.equal(layer.exact, weight), source
        assert not torch.equal(layer.dequantize(), weight)
    assert loaded(recipe, f"model.transformer={made}").proj_out.exact is None
    with exact_weights(mini_flux / "transformer") as every:
        assert "x_embedder.weight" in every.names
    # A folder that was quantized without the setting, or by another tool, has no exact weights.
    (made / EXACT_FILE).unlink()
    with pytest.raises(RecipeError, match=r"quant\.exact: .*proj_out\.weight"):
        loaded(recipe, exact, f"model.transformer={made}")


def test_errors_start_with_the_setting(mini_flux, tmp_path):
    recipe = write_recipe(tmp_path, mini_flux)
    with pytest.raises(RecipeError, match=r"quant\.exact: got 'last'.*no linear layer"):
        loaded(recipe, "quant.exact=[last]")
    adapted = ("quant.exact=[proj_out]", "lora.targets=[proj_out]")
    with pytest.raises(RecipeError, match=r"quant\.exact: got 'proj_out'.*has an adapter"):
        loaded(recipe, *adapted)
    family = Flux.open(str(mini_flux), None, 24)
    with pytest.raises(RecipeError, match=r"quant\.exact: got 'proj_out'.*has an adapter"):
        DryRun(load_recipe(recipe, adapted), family)
    # A base in full precision is exact everywhere.
    assert loaded(recipe, "quant.type=none", "quant.exact=[proj_out]").proj_out.weight.is_floating_point()


def test_plan_includes_the_exact_weight(mini_flux, tmp_path):
    recipe = write_recipe(tmp_path, mini_flux)
    family = Flux.open(str(mini_flux), None, 24)
    plain, exact = (
        sum(DryRun(load_recipe(recipe, [f"quant.exact={paths}"]), family).held.values())
        for paths in ("[]", "[proj_out]")
    )
    layer = load(mini_flux / "transformer").proj_out
    assert exact - plain == 4 * layer.in_features * layer.out_features


def test_run_trains_with_it_and_passes_the_self_check(mini_flux, tmp_path):
    recipe = write_recipe(tmp_path, mini_flux)
    quick = ("sample.prompts=[]", "train.steps=1", "train.grad_accumulation=1", "output.self_check=true")
    run = run_here(recipe, *quick, "quant.exact=[proj_out]")
    assert "proj_out.weight.absmax" in load_file(run / "transformer" / WEIGHTS)
