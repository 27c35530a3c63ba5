"""Tests of the shipped recipes: each loads and is complete, and the schema and reference page are current."""

import json
import re
from pathlib import Path

import pytest
import yaml

from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.recipe.reference_page import reference_page
from halfbyte.trainer.recipe.schema import json_schema, json_schema_text
from halfbyte.trainer.recipe.yaml12 import RecipeLoader

from repository import RECIPES

FOLDER = RECIPES
RECIPES = sorted(FOLDER.glob("*.yaml"))
EXPECTED = {
    "flux_lora",
    "flux_mini",
    "flux_schnell_lora",
    "sd35_large_lora",
    "sd3_lora",
    "sd3_mini",
}

# Recipes for a memory size, such as flux_8gb, give only the settings that make them fit. The others are complete.
FULL = [path for path in RECIPES if not re.search(r"_\d+gb$", path.stem)]

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def test_all_expected_recipes_exist() -> None:
    assert {path.stem for path in RECIPES} >= EXPECTED


@each_recipe
def test_every_recipe_loads_from_any_folder(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    assert recipe.output.dir == tmp_path / "runs" / path.stem
    pictures = "blueprints/train" if path.stem.endswith("_mini") else "photos"
    assert recipe.data.path == FOLDER / pictures


@each_recipe
def test_every_recipe_names_its_schema_for_editors(path: Path) -> None:
    assert path.read_text().splitlines()[0] == "# yaml-language-server: $schema=recipe.schema.json"


TAGS = {"shuffle_tags", "keep_tags", "tag_separator", "tag_dropout", "caption_variants"}
FORMS = {"image_column", "caption_column", "split", "config"}
HIDDEN = {
    "model": {"max_sequence_length", "vae_dtype"},
    "data": {
        "sets",
        "image_sizes",
        "masked_loss",
        "references",
        "on_bad_image",
        "caption_lines",
        "caption_suffix",
        *TAGS,
        *FORMS,
    },
    "objective": {"preserve"},
}


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_every_complete_recipe_gives_every_setting(path: Path) -> None:
    written = yaml.load(path.read_text(), Loader=RecipeLoader)
    complete = load_recipe(path).dump()
    for section, fields in complete.items():
        # Rarely changed settings are only on the reference page.
        hidden = HIDDEN.get(section, {"betas", "eps"})
        assert set(fields) - hidden <= set(written[section]), section


@each_recipe
def test_every_recipe_uses_the_shift_its_model_was_trained_with(path: Path) -> None:
    recipe = load_recipe(path)
    shift = recipe.objective.shift
    if recipe.model.family == "sd3":
        assert shift.model_dump() == {"name": "static", "shift": 3.0}
        assert recipe.quant.skip == ("proj_out",)
    else:
        assert shift.name == ("none" if "schnell" in path.stem else "resolution")


@each_recipe
def test_every_recipe_fits_the_json_schema(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    jsonschema.Draft202012Validator.check_schema(json_schema())
    validator = jsonschema.Draft202012Validator(json_schema())
    written = yaml.load(path.read_text(), Loader=RecipeLoader)
    assert [error.message for error in validator.iter_errors(written)] == []
    written["optimizer"]["lr"] = "1e-4x"
    written["train"]["stepz"] = 1
    assert len(list(validator.iter_errors(written))) == 2


def test_the_json_schema_in_the_recipes_folder_is_current() -> None:
    written = (FOLDER / "recipe.schema.json").read_text()
    assert written == json_schema_text(), "run `halfbyte schema recipes/recipe.schema.json`"


def test_the_reference_page_is_current() -> None:
    written = (FOLDER / "REFERENCE.md").read_text()
    assert written == reference_page(), (
        "run `python -m halfbyte.trainer.recipe.reference_page > recipes/REFERENCE.md`"
    )


def test_every_field_is_described_in_the_schema_and_on_the_page() -> None:
    schema, page = json_schema(), reference_page()
    for name, definition in schema["$defs"].items():
        assert definition.get("description"), f"{name} has no docstring"
        for field, node in definition["properties"].items():
            # A choice's name is described by the class it names.
            if "const" not in node:
                assert node.get("description"), f"{name}.{field} has no description"
                assert f"`{field}`" in page, f"{name}.{field} is not on the page"
    assert json.loads(json_schema_text()) == schema
