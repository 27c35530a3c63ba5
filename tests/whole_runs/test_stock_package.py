"""Pipelines that stock diffusers and bitsandbytes quantized, transformer and T5: they train as they are."""

import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from halfbyte.trainer.cli.app import app
from halfbyte.trainer.export.provenance import PROVENANCE_FILE, read_provenance
from halfbyte.trainer.training.metrics import read_metrics

from packages import write_package
from runs import run_here, write_recipe

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
# The recipe's default, which none of them is.
DEFAULT = "nf4 with double quantization"


HELD = {"nf4": "nf4", "fp4": "fp4", "int8": "int8, outliers from 6"}


@pytest.fixture(params=HELD)
def package(request, mini_flux, tmp_path):
    folder = tmp_path / "package"
    shutil.copytree(mini_flux, folder, ignore=shutil.ignore_patterns("transformer", "text_encoder_2"))
    write_package(mini_flux, folder, transformer=request.param, t5=request.param)
    return request.param, folder


def test_it_trains_without_a_quantization_in_the_recipe(package, tmp_path, caplog):
    kind, folder = package
    recipe = write_recipe(tmp_path, folder)
    recipe.write_text("".join(line for line in recipe.open() if not line.startswith("quant:")))
    with caplog.at_level(logging.WARNING):
        run = run_here(recipe, "train.steps=1", "train.grad_accumulation=1", "sample.prompts=[]")
    assert read_metrics(run / "metrics.csv")[0].loss > 0
    stored, exported = load_file(folder / WEIGHTS), load_file(run / WEIGHTS)
    assert stored.keys() == exported.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in stored.items())
    told = [record.message for record in caplog.records if "is quantized already" in record.message]
    assert len(told) == 1
    assert f"loaded as it is: {HELD[kind]}; what was asked for, {DEFAULT}, does not apply" in told[0]


def test_everything_tells_how_it_is_stored_and_not_what_the_recipe_says(package, tmp_path):
    kind, folder = package
    recipe = write_recipe(tmp_path, folder)
    asked = "nf4" if kind == "int8" else "int8"
    settings = (f"quant.type={asked}", "quant.double_quant=false", "train.steps=1", "sample.prompts=[a]")
    done = CliRunner().invoke(app, ["train", str(recipe), *settings])
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("base ") and "layers" in line]
    assert line.split(maxsplit=1)[1].startswith(f"{HELD[kind]}; ")
    run = tmp_path / "run"
    written = read_provenance(run / "adapter" / PROVENANCE_FILE).quant
    assert written is not None
    assert (written.quant_type, written.double_quant) == (kind, False)
    card = CliRunner().invoke(app, ["push", str(run), "--repo", "ann/dog", "--dry-run"]).output
    assert f"is the base that the adapter was trained on ({HELD[kind]}, computed in float32)" in card
    assert f"| base in training | {HELD[kind]}, computed in float32 |" in card
    assert "section `quant` did not apply" in card
