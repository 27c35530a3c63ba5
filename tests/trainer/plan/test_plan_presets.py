"""The recipes for a card's size: by its plan, each fits its card and uses most of its memory."""

import re
from pathlib import Path

import pytest
import yaml

from halfbyte.trainer.plan.fit import open_planner
from halfbyte.trainer.plan.planner import Planner
from halfbyte.trainer.plan.published_configs import write_configurations
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.recipe.recipe import differences
from halfbyte.trainer.recipe.yaml12 import RecipeLoader
from halfbyte.trainer.runtime.sizes import GIB

from repository import RECIPES

FOLDER = RECIPES
PRESETS = sorted(path for path in FOLDER.glob("*.yaml") if re.search(r"_\d+gb$", path.stem))


def test_there_are_presets() -> None:
    assert {path.stem for path in PRESETS} >= {f"flux_{card}gb" for card in (4, 6, 8, 12, 16, 24)}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_differs_from_the_full_recipe_only_where_it_says(path: Path) -> None:
    """The comment at the top of each preset promises this."""
    (full,) = re.findall(r"Settings not given here are as in (\w+)\.yaml", path.read_text())
    written = yaml.load(path.read_text(), Loader=RecipeLoader)
    for line in differences(load_recipe(FOLDER / f"{full}.yaml"), load_recipe(path)):
        section, field = line.split(":")[0].split(".")[:2]
        assert field in written[section], line


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("full_size")
    published = {
        "flux": "black-forest-labs/FLUX.1-dev",
        "sd35_large": "stabilityai/stable-diffusion-3.5-large",
    }
    return {model: write_configurations(root / model, name) for model, name in published.items()}


@pytest.fixture(scope="module")
def planners() -> dict[str, Planner]:
    """The first planner of each model. Presets with the same layers share its dry runs."""
    return {}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_fits_its_card(path: Path, models: dict[str, Path], planners: dict[str, Planner]) -> None:
    """With sample images too, because users add their own prompts."""
    model, card = path.stem.rsplit("_", 1)
    budget = int(card.removesuffix("gb")) * GIB
    recipe = load_recipe(path, [f"model.path={models[model]}", "sample.prompts=[a dog]"])
    planner = open_planner(recipe)
    first = planners.setdefault(model, planner)
    planner._dry_runs, planner._steps, planner._predictions = (
        first._dry_runs,
        first._steps,
        first._predictions,
    )
    planner._encoders, planner._decoders = first._encoders, first._decoders
    plan = planner.plan()
    for phase in plan.phases:
        assert phase.device_bytes <= budget, phase.name
    assert plan.largest.device_bytes > 0.7 * budget
