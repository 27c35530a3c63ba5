"""Tests `halfbyte quantize`: it reduces the error, stock diffusers loads the result, and runs train on it."""

import json
import re

import pytest
import torch
from diffusers import FluxTransformer2DModel
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from halfbyte.quant.convert.calibrate import calibrate
from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.convert.replace_linears import convert
from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.trainer.data.prepare import prepare
from halfbyte.trainer.denoiser import base
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.denoiser.settings import quant_recipe
from halfbyte.trainer.errors import DataError, LaunchError, OutOfMemory, RecipeError
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.quantize.run import REPORT, quantize, quantized_lines
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.runtime.world import World, read_world
from halfbyte.trainer.training.validation import Validation

from judge import stock_bitsandbytes_on_cpu
from probe import prediction
from repository import RECIPES
from runs import command, run_here, write_recipe

CPU = torch.device("cpu")
ALONE = read_world({"ACCELERATE_USE_CPU": "true"})


def written(recipe, folder, *overrides, samples=8, world=ALONE):
    return quantize(load_recipe(recipe, overrides), folder, samples, world, Console(quiet=True))


def relative(values, expected):
    return ((values.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The trained miniature, calibrated on its recipe's images by the command itself."""
    folder = tmp_path_factory.mktemp("quantize")
    recipe = RECIPES / "flux_mini.yaml"
    cache = f"data.cache_dir={folder / 'cache'}"
    arguments = ("quantize", str(recipe), cache, "--samples", "64", "--output", str(folder / "calibrated"))
    result = command("-c", "from halfbyte.trainer.cli.main import main; main()", *arguments)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def velocities(recipe):
    """Predicts with a recipe's base, without an adapter, on its held-out images at three sigmas."""
    model = recipe.model
    family = Flux.open(model.path, None, model.max_sequence_length, model.transformer)
    prepared = prepare(recipe, family, ALONE, Console(quiet=True))
    validation = Validation(
        family,
        load_base(family, quant_recipe(recipe), device=CPU, dtype=torch.float32),
        prepared.held_out,
        prepared.held_out_set,
        sigmas=(0.2, 0.5, 0.8),
        guidance_scale=1.0,
        compute_dtype=torch.float32,
        batch_size=8,
        world=ALONE,
    )
    return torch.cat([velocity for _, velocity, _ in validation.predictions()])


def test_calibration_reduces_the_error_on_unseen_images(shipped):
    folder, _ = shipped
    bases = ("quant.type=none", "quant.type=nf4", f"model.transformer={folder / 'calibrated'}")
    expected, plain, calibrated = (
        velocities(load_recipe(RECIPES / "flux_mini.yaml", [f"data.cache_dir={folder / 'cache'}", base]))
        for base in bases
    )
    assert relative(calibrated, expected) < 0.75 * relative(plain, expected)


def test_the_report_lists_the_calibrated_layers(shipped):
    folder, output = shipped
    report = json.loads((folder / "calibrated" / REPORT).read_text())
    layers = report["layers"]
    assert report["samples"] == 64
    assert len(layers) == 67  # all but x_embedder
    assert all(0 <= layer["after"] <= layer["before"] for layer in layers)
    assert sum(layer["after"] < 0.7 * layer["before"] for layer in layers) > 60
    assert "67 layers" in output
    assert f"model.transformer={folder / 'calibrated'}" in output


def test_stock_diffusers_loads_the_result(shipped):
    folder, _ = shipped
    ours = load_base(
        Flux.open(str(RECIPES / "mini" / "flux"), None, 32, folder / "calibrated"),
        None,
        device=CPU,
        dtype=torch.bfloat16,
    )
    with stock_bitsandbytes_on_cpu():
        stock = FluxTransformer2DModel.from_pretrained(folder / "calibrated", torch_dtype=torch.bfloat16)
    assert relative(prediction(stock), prediction(ours)) < 0.02


def test_a_run_trains_on_the_result_and_exports_it(mini_flux, tmp_path):
    recipe = write_recipe(tmp_path, mini_flux)
    made = written(recipe, tmp_path / "calibrated")
    quick = ("sample.prompts=[]", "train.steps=1", "train.grad_accumulation=1", "output.self_check=true")
    run = run_here(recipe, *quick, f"model.transformer={made.folder}")
    name = "diffusion_pytorch_model.safetensors"
    exported, calibrated = (load_file(folder / name) for folder in (run / "transformer", made.folder))
    assert exported.keys() == calibrated.keys()
    assert all(torch.equal(exported[key], calibrated[key]) for key in exported)
    plain = written(recipe, tmp_path / "plain", samples=0)
    assert plain.fits == []
    rounded = load_file(plain.folder / name)
    moved = [key for key in rounded if not torch.equal(rounded[key], calibrated[key])]
    # Calibration changes only codes. Scales and unquantized tensors stay the same.
    assert moved
    assert all(key.endswith(".weight") and rounded[key].dtype == torch.uint8 for key in moved)


@pytest.mark.parametrize(
    "settings", [(), ("quant.type=fp4", "quant.double_quant=false"), ("quant.skip=[proj_out]",)]
)
def test_sd3_and_other_settings(mini_sd3, tmp_path, settings):
    recipe = write_recipe(tmp_path, mini_sd3, family="sd3")
    made = written(recipe, tmp_path / "calibrated", *settings)
    assert made.fits
    assert all(fit.after <= fit.before for fit in made.fits)
    assert not any("proj_out" in fit.path for fit in made.fits) or "quant.skip=[proj_out]" not in settings
    assert (tmp_path / "calibrated" / "config.json").is_file()
    lines = list(quantized_lines(made))
    assert f"{len(made.fits)} layers" in lines[1]
    # The path is absolute, because a relative owner/name would name a Hub repository.
    assert lines[-1].endswith(f" model.transformer={tmp_path / 'calibrated'}")


def test_little_memory_means_more_passes_over_the_same_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 192), nn.GELU(), nn.Linear(192, 8))
    narrow = nn.Linear(96, 64)  # its quantization blocks cross the ends of rows
    model.add_module("narrow", narrow)
    weights = {
        path: layer.weight.detach().clone()
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    convert(model, QuantRecipe(compute_dtype=torch.float32))
    data = torch.randn(400, 128) @ torch.randn(128, 128)
    expected = data
    for layer in (0, 2, 4):
        linear = model[layer]
        expected = nn.functional.linear(expected, weights[str(layer)], linear.bias)
        expected = nn.functional.gelu(expected) if layer < 4 else expected

    def output():
        with torch.no_grad():
            return model[4](model[3](model[2](model[1](model[0](data)))))

    passes = []

    def run():
        passes.append(len(passes))
        output()

    before = relative(output(), expected)
    codes = model.narrow.weight.clone()
    seen = []
    fits = calibrate(
        model, weights.__getitem__, [run], moment_bytes=1, progress=lambda *done: seen.append(done)
    )
    assert [fit.path for fit in fits] == ["0", "2", "4"]
    assert len(passes) == 3
    assert seen == [(step, 6) for step in range(1, 7)]
    assert {fit.inputs for fit in fits} == {400}
    assert relative(output(), expected) < 0.8 * before
    assert torch.equal(model.narrow.weight, codes)
    # A layer that gets no input keeps its codes.
    assert calibrate(model, weights.__getitem__, [], moment_bytes=10**9) == []
    assert isinstance(model[0], Linear4bit)


def test_an_invalid_request_is_rejected_before_anything_is_loaded(mini_flux, mini_sd3, tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, mini_flux)
    made = written(recipe, tmp_path / "made", samples=0)
    monkeypatch.setattr(base, "_read", lambda *_, **__: pytest.fail("the base was loaded"))
    with pytest.raises(RecipeError, match=re.escape(f"{tmp_path / 'made'}: not empty")):
        written(recipe, tmp_path / "made")
    with pytest.raises(RecipeError, match=r"^quant\.type: got none"):
        written(recipe, tmp_path / "new", "quant.type=none")
    with pytest.raises(RecipeError, match=r"^quant\.type: got int8"):
        written(recipe, tmp_path / "new", "quant.type=int8")
    with pytest.raises(RecipeError, match=re.escape(f"{made.folder}: already quantized")):
        written(recipe, tmp_path / "new", f"model.transformer={made.folder}")
    with pytest.raises(LaunchError, match="one process"):
        written(recipe, tmp_path / "new", world=World(2, 0, 2, 0, CPU))
    with pytest.raises(RecipeError, match="SD3Transformer2DModel"):
        written(recipe, tmp_path / "new", f"model.transformer={mini_sd3 / 'transformer'}")
    config = json.loads((made.folder / "config.json").read_text())
    (made.folder / "config.json").write_text(json.dumps(config | {"num_layers": 7}))
    with pytest.raises(RecipeError, match=r"num_layers\b.*\b7\b"):
        written(recipe, tmp_path / "new", f"model.transformer={made.folder}")
    (made.folder / "diffusion_pytorch_model.safetensors").unlink()
    (made.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"model\.transformer: .*no weights"):
        written(recipe, tmp_path / "new", f"model.transformer={made.folder}")
    for picture in (tmp_path / "pictures").iterdir():
        picture.unlink()
    with pytest.raises(DataError):
        written(recipe, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_full_device_is_reported_and_nothing_is_written(mini_flux, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("halfbyte.trainer.quantize.run.calibrate_for", full)
    with pytest.raises(OutOfMemory, match=r"data\.resolution"):
        written(write_recipe(tmp_path, mini_flux), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nan_inputs_are_reported_with_the_layer(mini_flux, tmp_path, monkeypatch):
    load = base._read

    def damaged(*arguments, **settings):
        denoiser = load(*arguments, **settings)
        denoiser.x_embedder.bias.data.fill_(float("nan"))
        return denoiser

    monkeypatch.setattr(base, "_read", damaged)
    with pytest.raises(RecipeError, match=r"calibration: .*transformer_blocks\.0\.attn\.to_q: "):
        written(write_recipe(tmp_path, mini_flux), tmp_path / "new")
    assert not (tmp_path / "new").exists()
