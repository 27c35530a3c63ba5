"""Tests `halfbyte cache`: listing cached files with their sizes, and deleting them."""

import json
import re

import pytest
import torch
from diffusers import SD3Transformer2DModel
from typer.testing import CliRunner

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.files.shards import WEIGHTS_FILE
from halfbyte.trainer.cli.app import app
from halfbyte.trainer.pretrained.component import pipelines_component
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.pretrained.packed_cache import BaseCache
from halfbyte.trainer.pretrained.pipeline import ModelSource
from halfbyte.trainer.recipe.data_section import DataSection
from halfbyte.trainer.recipe.fields import DEFAULT_FOLDER
from halfbyte.trainer.runtime.sizes import file_size


@pytest.fixture
def folder(mini_sd3, tmp_path):
    keep(ModelSource("mini", mini_sd3, None), tmp_path)
    (tmp_path / "texts" / "ab").mkdir(parents=True)
    (tmp_path / "texts" / "ab" / "entry.safetensors").write_bytes(bytes(3 * 10**8))
    return tmp_path


def keep(source, folder):
    cache = BaseCache(folder / "bases", FileDigests(folder / "digests"))
    component = pipelines_component(source, "transformer", WEIGHTS_FILE)
    cache.load(
        SD3Transformer2DModel, component, QuantRecipe("fp4"), dtype=torch.bfloat16, device=torch.device("cpu")
    )


def run(*arguments):
    return CliRunner().invoke(app, ["cache", *map(str, arguments)])


def test_lists_each_kind_and_each_base(folder):
    result = run("--folder", folder)
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    assert ["texts", "1", "files", "300.0", "MB"] in lines
    assert ["latents", "0", "files", "0", "B"] in lines
    (base,) = (path for path in (folder / "bases").iterdir() if path.is_dir())
    manifest = json.loads((base / "manifest.json").read_text())
    size = file_size(sum(file["bytes"] for file in manifest["files"].values()))
    packed = ["fp4", "with", "double", "quantization"]
    assert [base.name, "SD3Transformer2DModel", *size.split(), "mini", *packed] in lines
    # Older versions wrote no source.
    del manifest["source"]
    (base / "manifest.json").write_text(json.dumps(manifest))
    listed = run("--folder", folder).output
    assert (
        f"{base.name}  SD3Transformer2DModel  {size}  unknown source  fp4 with double quantization" in listed
    )
    (base / "manifest.json").write_text("{")
    assert f"{base.name}  damaged" in run("--folder", folder).output


def test_lists_a_hub_base_with_its_commit(mini_sd3, tmp_path):
    source = ModelSource("ann/model", mini_sd3, "0123456789abcdef")
    keep(source, tmp_path)
    listed = run("--folder", tmp_path).output
    assert re.search(r"SD3Transformer2DModel  [\d.]+ kB  ann/model @ 0123456789ab  fp4", listed)


def test_clear_deletes_only_the_named_kind(folder):
    result = run("--folder", folder, "--clear", "texts")
    assert "deleted texts: 300.0 MB" in result.output
    assert not (folder / "texts").exists()
    assert list((folder / "bases").iterdir())
    run("--folder", folder, "--clear", "bases", "--clear", "digests")
    assert list(folder.iterdir()) == []


def test_an_unknown_kind_deletes_nothing(folder):
    result = run("--folder", folder, "--clear", "everything")
    assert result.exit_code == 2
    assert "--clear: " in result.output
    assert "'everything'" in result.output
    assert "images, latents, masks, texts, bases, digests" in result.output
    assert (folder / "texts").exists()


def test_a_missing_folder_counts_as_empty(tmp_path):
    result = run("--folder", tmp_path / "none")
    assert result.exit_code == 0
    assert "0 files" in result.output


def test_the_default_folder_is_the_same_as_in_recipes(tmp_path):
    assert DataSection(path=tmp_path).cache_folder == DEFAULT_FOLDER.expanduser()
