"""`halfbyte cache`: what is kept, what it takes, and getting rid of it."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from typer.testing import CliRunner

from halfbyte.quant.convert import QuantRecipe
from halfbyte.quant.shards import WEIGHTS_FILE
from halfbyte.trainer.base_cache import BaseCache
from halfbyte.trainer.cache_folder import DEFAULT_FOLDER
from halfbyte.trainer.commands import app
from halfbyte.trainer.component import pipelines_component
from halfbyte.trainer.file_digests import FileDigests
from halfbyte.trainer.recipe_sections import DataSection
from halfbyte.trainer.source import ModelSource


@pytest.fixture
def folder(mini_sd3, tmp_path):
    cache = BaseCache(tmp_path / "bases", FileDigests(tmp_path / "digests"))
    source = pipelines_component(ModelSource("mini", mini_sd3, None), "transformer", WEIGHTS_FILE)
    cache.load(
        SD3Transformer2DModel, source, QuantRecipe("fp4"), dtype=torch.bfloat16, device=torch.device("cpu")
    )
    (tmp_path / "texts" / "ab").mkdir(parents=True)
    (tmp_path / "texts" / "ab" / "entry.safetensors").write_bytes(bytes(3 * 10**8))
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["cache", *map(str, arguments)])


def test_each_kind_and_each_base_is_listed(folder):
    result = run("--folder", folder)
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    assert ["texts", "1", "files", "0.3", "GB"] in lines
    assert ["latents", "0", "files", "0.0", "GB"] in lines
    (base,) = (path for path in (folder / "bases").iterdir() if path.is_dir())
    assert [base.name, "SD3Transformer2DModel", "fp4", "0.0", "GB"] in lines
    (base / "manifest.json").write_text("{")
    assert f"{base.name}  damaged" in run("--folder", folder).output


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
