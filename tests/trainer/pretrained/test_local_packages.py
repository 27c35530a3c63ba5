"""Tests a transformer and a T5 from folders that are not pipelines: training, pinning and cache entries."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from halfbyte.trainer.cli.app import app
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.encoders import load_encoders
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.families.sd3.family import SD3
from halfbyte.trainer.pretrained.file_digests import FileDigests

from packages import T5_WEIGHTS, WEIGHTS, with_halved_norms, write_t5
from runs import run_here, write_recipe
from tensors import assert_same_tensors

QUICK = ("sample.prompts=[]", "optimizer.lr=0.02")


def test_local_packages_train_and_are_pinned(flux_package, bare_flux, tmp_path, monkeypatch):
    own = shutil.copytree(flux_package / "both", tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, bare_flux)
    named = ("model.transformer=./own", "model.text_encoder=./own")
    run = run_here(recipe, *QUICK, "train.steps=1", *named)
    assert_same_tensors(run / WEIGHTS, own / WEIGHTS)
    (own / T5_WEIGHTS).write_bytes(with_halved_norms((own / T5_WEIGHTS).read_bytes()))
    for arguments in (("export", run), ("train", recipe, *QUICK, *named, "--resume")):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 2, done.output
        assert "T5" in done.output
        assert str(run) in done.output
    (own / T5_WEIGHTS).unlink()
    done = CliRunner().invoke(app, ["export", str(run)])
    assert f"model.text_encoder: {own / 'text_encoder_2'}: no weights" in done.output


def test_sd3_takes_a_t5_from_a_separate_package(mini_sd3, tmp_path):
    bare = shutil.copytree(mini_sd3, tmp_path / "bare", ignore=shutil.ignore_patterns("text_encoder_3"))
    write_t5(mini_sd3 / "text_encoder_3", tmp_path / "package" / "text_encoder_3", "nf4")
    with pytest.raises(RecipeError, match="bare: text_encoder_3 missing;"):
        SD3.open(str(bare), None, 24)
    whole = shutil.copytree(bare, tmp_path / "whole")
    shutil.copytree(tmp_path / "package", whole, dirs_exist_ok=True)
    embeddings = []
    for family in (SD3.open(str(bare), None, 24, None, tmp_path / "package"), SD3.open(str(whole), None, 24)):
        encoders = load_encoders(
            family, device=torch.device("cpu"), dtype=torch.bfloat16, memo=tmp_path / "memo"
        )
        embeddings.append(encoders.encode_texts(["a dog"]).prompt_embeds)
    assert torch.equal(*embeddings)
    (tmp_path / "package" / "text_encoder_3").rename(tmp_path / "package" / "other")
    (tmp_path / "package" / "model_index.json").write_text("{}")
    message = r"model\.text_encoder: .*'text_encoder_3'; it has other"
    with pytest.raises(RecipeError, match=message):
        SD3.open(str(bare), None, 24, None, tmp_path / "package")


def test_the_text_fingerprint_depends_on_the_t5(flux_package, mini_flux, tmp_path):
    other = shutil.copytree(flux_package / "t5", tmp_path / "other")
    (other / "model.safetensors").write_bytes(with_halved_norms((other / "model.safetensors").read_bytes()))
    skewed = shutil.copytree(flux_package / "t5", tmp_path / "skewed")
    config = json.loads((skewed / "config.json").read_text())
    config["quantization_config"]["llm_int8_threshold"] = 0.0
    (skewed / "config.json").write_text(json.dumps(config))
    same = shutil.copytree(flux_package / "t5", tmp_path / "same")

    def fingerprint(text_encoder, quant="auto"):
        family = Flux.open(str(mini_flux), None, 24, None, text_encoder)
        encoders = load_encoders(
            family, device=torch.device("cpu"), dtype=torch.bfloat16, memo=tmp_path / "memo", t5_quant=quant
        )
        return encoders.text_fingerprint

    sources = (None, flux_package / "both", flux_package / "t5", other, skewed)
    assert len({fingerprint(source) for source in sources}) == len(sources)
    # A stored quantization stays, whatever the setting asks for.
    for quant in ("auto", "none", "int8", "nf4"):
        assert fingerprint(same, quant) == fingerprint(flux_package / "t5")
    at = Flux.open(str(mini_flux), None, 24, None, flux_package / "t5")
    prints = set()
    for revision in ("a" * 40, "b" * 40):
        at.t5 = replace(at.t5, name="we/t5-int8", revision=revision)
        prints.add(at.text_fingerprint(FileDigests(tmp_path / "memo")))
    assert len(prints) == 2
