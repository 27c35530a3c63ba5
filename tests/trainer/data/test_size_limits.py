"""Tests that images too large for the model are refused by every command before anything slow happens."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from halfbyte.trainer.cli.app import app, train_app
from halfbyte.trainer.data.size_limits import refuse_large
from halfbyte.trainer.data.views.buckets import bucket_sizes
from halfbyte.trainer.denoiser import base
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families import encoders
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.families.sd3.family import SD3
from halfbyte.trainer.recipe.load import load_recipe

from repository import RECIPES
from runs import write_recipe
from sample_calls import invoke

LIMIT = 32 * 2 * 8  # the miniature's table of positions x patch size x VAE factor


@pytest.fixture
def toy(tmp_path: Path, mini_sd3: Any) -> Path:
    return write_recipe(tmp_path, mini_sd3, family="sd3")


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(base, "_read", loaded)
    monkeypatch.setattr(encoders, "PipelineEncoders", loaded)


def test_the_limit_comes_from_the_model(mini_flux: Any, mini_sd3: Any) -> None:
    assert SD3.open(str(mini_sd3), None, 24).largest_side == LIMIT
    assert Flux.open(str(mini_flux), None, 24).largest_side is None


@pytest.mark.parametrize("command", [[app, "plan"], [train_app]], ids=["plan", "train"])
@pytest.mark.parametrize(
    ("setting", "got", "limit"),
    [("data.resolution=512", 512, 272), ("sample.width=528", 528, 512), ("sample.height=1024", 1024, 512)],
)
def test_a_run_is_refused_before_it_encodes(
    toy: Path, command: list[Any], setting: str, got: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    result = CliRunner().invoke(command[0], [*command[1:], str(toy), setting])
    assert result.exit_code == 2, result.output
    assert f"command line: {setting}: got {got}, expected at most {limit}" in result.output
    assert isinstance(result.exception, SystemExit)


def test_the_limits_in_the_messages_are_exact(toy: Path, mini_sd3: Any) -> None:
    family = SD3.open(str(mini_sd3), None, 24)

    def check(*settings: str) -> None:
        refuse_large(load_recipe(toy, settings), family)

    assert max(max(size) for size in bucket_sizes(272, 16)) <= LIMIT
    assert max(max(size) for size in bucket_sizes(288, 16)) > LIMIT
    check("data.resolution=272", "sample.width=512")
    check("data.resolution=512", "data.aspect_buckets=false")
    with pytest.raises(RecipeError, match=r"at most 272.*data\.aspect_buckets=false at most 512"):
        check("data.resolution=288")
    with pytest.raises(RecipeError, match="at most 512"):
        check("data.resolution=528", "data.aspect_buckets=false")
    # Without prompts no image is generated, so its size is not checked.
    check("sample.prompts=[]", "sample.width=1024")


def test_halfbyte_sample_refuses_large_images(mini_sd3: Any) -> None:
    result = invoke(mini_sd3, "--prompt", "a", "--width", 64, "--height", 1024)
    assert result.exit_code == 2, result.output
    assert "--height: got 1024," in result.output
    assert "512" in result.output


def test_the_resolution_in_the_message_is_valid_in_a_recipe() -> None:
    """The shipped miniature's size_multiple of 8 is smaller than the step of 16 of sizes in recipes."""
    recipe = load_recipe(RECIPES / "sd3_mini.yaml", ["data.resolution=512"])
    family = SD3.open(recipe.model.path, None, None)
    assert family.size_multiple == 8
    with pytest.raises(RecipeError, match="at most 128"):
        refuse_large(recipe, family)
