"""Training on pipelines whose transformer and T5 were quantized by stock diffusers and bitsandbytes."""

import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from halfbyte.trainer.adapters.listed_digests import PROVENANCE_FILE
from halfbyte.trainer.cli.app import app
from halfbyte.trainer.export.provenance import read_provenance
from halfbyte.trainer.training.metrics import read_metrics

from packages import write_package
from runs import run_here, write_recipe

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
# How output names each stored format; "nf4 with double quantization", the recipe's default, is none of them.
STORED = {"nf4": "nf4", "fp4": "fp4", "int8": "int8, outliers from 6"}


@pytest.fixture(params=STORED)
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
    # One warning names the stored format and the recipe's default, which does not apply.
    default = "nf4 with double quantization"
    warnings = [record.message for record in caplog.records if default in record.message]
    assert len(warnings) == 1
    assert STORED[kind] in warnings[0].replace(default, "")


def test_output_provenance_and_card_report_the_stored_format_not_the_recipes(package, tmp_path):
    kind, folder = package
    recipe = write_recipe(tmp_path, folder)
    asked = "nf4" if kind == "int8" else "int8"
    settings = (f"quant.type={asked}", "quant.double_quant=false", "train.steps=1", "sample.prompts=[a]")
    done = CliRunner().invoke(app, ["train", str(recipe), *settings])
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("base ") and "layers" in line]
    assert line.split(maxsplit=1)[1].startswith(f"{STORED[kind]}; ")
    run = tmp_path / "run"
    written = read_provenance(run / "adapter" / PROVENANCE_FILE).quant
    assert written is not None
    assert (written.quant_type, written.double_quant) == (kind, False)
    card = CliRunner().invoke(app, ["push", str(run), "--repo", "ann/dog", "--dry-run"]).output
    stored = [line for line in card.splitlines() if STORED[kind] in line and "float32" in line]
    assert any(line.startswith("|") for line in stored), "the table of training facts"
    assert any(not line.startswith("|") for line in stored), "the paragraph on the base"
    assert "section `quant`" in card
