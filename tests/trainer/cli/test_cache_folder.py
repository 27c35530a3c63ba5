"""`halfbyte cache`: what is kept, what it takes, and getting rid of it."""

import json

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
from halfbyte.trainer.recipe.fields import DEFAULT_FOLDER
from halfbyte.trainer.recipe.sections import DataSection


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


def test_each_kind_and_each_base_is_listed(folder):
    result = run("--folder", folder)
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    assert ["texts", "1", "files", "0.3", "GB"] in lines
    assert ["latents", "0", "files", "0.0", "GB"] in lines
    (base,) = (path for path in (folder / "bases").iterdir() if path.is_dir())
    packed = ["fp4", "with", "double", "quantization"]
    assert [base.name, "SD3Transformer2DModel", "0.0", "GB", "mini", *packed] in lines
    manifest = json.loads((base / "manifest.json").read_text())
    # As older versions wrote it.
    del manifest["source"]
    (base / "manifest.json").write_text(json.dumps(manifest))
    listed = run("--folder", folder).output
    assert (
        f"{base.name}  SD3Transformer2DModel  0.0 GB  unknown source  fp4 with double quantization" in listed
    )
    (base / "manifest.json").write_text("{")
    assert f"{base.name}  damaged" in run("--folder", folder).output


def test_a_base_of_the_hub_is_listed_with_its_commit(mini_sd3, tmp_path):
    source = ModelSource("ann/model", mini_sd3, "0123456789abcdef")
    keep(source, tmp_path)
    assert "SD3Transformer2DModel  0.0 GB  ann/model @ 0123456789ab  fp4" in run("--folder", tmp_path).output


def test_a_kind_is_deleted_and_no_other(folder):
    result = run("--folder", folder, "--clear", "texts")
    assert "deleted texts: 0.3 GB" in result.output
    assert not (folder / "texts").exists()
    assert list((folder / "bases").iterdir())
    run("--folder", folder, "--clear", "bases", "--clear", "digests")
    assert list(folder.iterdir()) == []


def test_an_unknown_kind_deletes_nothing(folder):
    result = run("--folder", folder, "--clear", "everything")
    assert result.exit_code == 2
    assert "--clear: got 'everything', accepted: latents, texts, bases, digests" in result.output
    assert (folder / "texts").exists()


def test_a_folder_that_is_not_there_holds_nothing(tmp_path):
    result = run("--folder", tmp_path / "none")
    assert result.exit_code == 0
    assert "0 files" in result.output


def test_the_default_folder_is_the_recipes(tmp_path):
    assert DataSection(path=tmp_path).cache_folder == DEFAULT_FOLDER.expanduser()
