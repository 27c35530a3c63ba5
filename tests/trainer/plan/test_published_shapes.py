"""Plans of published models without the Hub: they use the built-in configurations, and say so."""

from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from typer.testing import CliRunner

from halfbyte.quant.load.on_meta import model_on_meta
from halfbyte.quant.load.text_encoder import count_parameters
from halfbyte.trainer.cli.app import app, train_app
from halfbyte.trainer.errors import HubError
from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.hub import download as hub_download
from halfbyte.trainer.hub.download import NoSuchRevision
from halfbyte.trainer.plan.fit import open_planner
from halfbyte.trainer.plan.published_configs import PUBLISHED, write_configurations
from halfbyte.trainer.pretrained import pipeline as source
from halfbyte.trainer.recipe.load import load_recipe

from repository import RECIPES

FOLDER = RECIPES
RECIPE = FOLDER / "sd3_lora.yaml"


@pytest.fixture(autouse=True)
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses an empty Hub cache, so that no earlier download is found; conftest.py makes the Hub offline."""
    download = hub_download.snapshot_download
    monkeypatch.setattr(
        hub_download, "snapshot_download", lambda *a, **k: download(*a, **k, cache_dir=tmp_path / "hub")
    )


@pytest.mark.parametrize(
    ("name", "family", "parameters"),
    [
        ("black-forest-labs/FLUX.1-dev", "flux", 11_901_408_320),
        ("black-forest-labs/FLUX.1-schnell", "flux", 11_891_178_560),
        ("stabilityai/stable-diffusion-3-medium-diffusers", "sd3", 2_028_328_000),
        ("stabilityai/stable-diffusion-3.5-medium", "sd3", 2_243_171_520),
        ("stabilityai/stable-diffusion-3.5-large", "sd3", 8_056_627_520),
    ],
)
def test_a_published_model_has_its_parameters(
    name: str, family: str, parameters: int, tmp_path: Path
) -> None:
    folder = write_configurations(tmp_path, name)
    opened = FAMILIES[family](source.ModelSource(name, folder, None), None)
    model = model_on_meta(opened.denoiser_class, opened.denoiser_config, None, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("black-forest-labs/FLUX.1-dev", [123_060_480, 4_762_310_656]),
        ("stabilityai/stable-diffusion-3.5-large", [123_650_304, 694_659_840, 4_762_310_656]),
    ],
)
def test_published_encoders_have_their_parameters(name: str, parameters: list[int], tmp_path: Path) -> None:
    folder = write_configurations(tmp_path, name)
    counted = [
        count_parameters(getattr(transformers, class_name), folder / part)
        for part, (class_name, _) in PUBLISHED[name].texts.items()
    ]
    assert counted == parameters


def test_all_recipes_of_hub_models_have_built_in_configurations() -> None:
    paths = {load_recipe(path).model.path for path in FOLDER.glob("*_lora.yaml")}
    assert paths <= PUBLISHED.keys()


def test_the_command_plans_without_the_hub_and_says_so() -> None:
    result = CliRunner().invoke(app, ["plan", str(RECIPE)])
    assert result.exit_code == 0, result.output
    name = load_recipe(RECIPE).model.path
    (note,) = [line for line in result.stdout.splitlines() if "built-in" in line]
    assert name in note
    assert "local Hub cache" in note
    # T5-XXL takes 8.9 GiB in bf16, and 4 are left for the rest.
    (note,) = [line for line in result.stdout.splitlines() if "model.text_encoder_quant" in line]
    assert "in bf16 where 12.87 GiB" in note


def test_components_in_unavailable_repositories_are_noted(tmp_path: Path) -> None:
    """The command prints these notes, see above."""
    named = [f"model.{field}=we/nf4-pkg" for field in ("transformer", "text_encoder")]
    notes = open_planner(load_recipe(RECIPE, named), tmp_path / "published").notes
    for setting in ("model.transformer", "model.text_encoder"):
        (note,) = [line for line in notes if f"{setting}: " in line and "we/nf4-pkg" in line]
        assert "pipeline's own" in note
        assert "local Hub cache" in note


def test_training_and_unknown_models_still_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    training = CliRunner().invoke(train_app, [str(RECIPE), f"output.dir={tmp_path / 'run'}"])
    assert training.exit_code == 4, training.output
    unknown = CliRunner().invoke(app, ["plan", str(RECIPE), "model.path=ann/dog"])
    assert unknown.exit_code == 4, unknown.output


def test_a_revision_that_does_not_exist_still_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such(*_: object, **__: object) -> None:
        raise NoSuchRevision("model.revision: no")

    monkeypatch.setattr("halfbyte.trainer.plan.fit.resolve_configurations", no_such)
    with pytest.raises(NoSuchRevision):
        open_planner(load_recipe(RECIPE), tmp_path / "published")


def test_built_in_configurations_need_a_folder() -> None:
    with pytest.raises(HubError):
        open_planner(load_recipe(RECIPE))


def test_a_gated_repository_is_planned_with_built_in_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gated(*_: object, **__: object) -> None:
        # Built without its arguments: those are of the Hub client's HTTP library, which depends on the
        # client's version.
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setattr(hub_download, "snapshot_download", gated)
    (note,) = open_planner(load_recipe(RECIPE), tmp_path / "published").notes
    assert "gated" in note
