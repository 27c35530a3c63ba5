"""Tests of recipes as values: frozen, written and read back, compared, and randomly corrupted."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.recipe.recipe import Recipe, differences
from halfbyte.trainer.recipe.schema import SchemaTree, json_schema
from halfbyte.trainer.recipe.yaml12 import RecipeDumper

from small_recipe import SMALL, Write


def test_recipes_are_frozen(write: Write) -> None:
    recipe = load_recipe(write(SMALL))
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        recipe.objective.loss.name = "l1"


def test_a_written_recipe_loads_as_an_equal_one_from_any_folder(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write(SMALL), ["lora.targets=[to_q]", "optimizer.lr=1e-5", "objective.loss.name=l1"])
    copy = tmp_path / "elsewhere" / "copy.yaml"
    copy.write_text(recipe.to_yaml())
    monkeypatch.chdir("/")
    assert load_recipe(copy) == recipe
    assert differences(load_recipe(copy), recipe) == []


@settings(deadline=None, max_examples=50)
@given(
    prefix=st.text(),
    prompts=st.lists(st.text(min_size=1), max_size=3),
    lr=st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False),
    revision=st.sampled_from(["1e5", "0o17", "010", "yes", "null", "1_000", "12e34567", "~", "1:30", "0x1"]),
)
def test_any_text_survives_writing_and_reading(
    tmp_path_factory: pytest.TempPathFactory, prefix: str, prompts: list[str], lr: float, revision: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    values = {
        "model": {"family": "sd3", "path": "owner/name", "revision": revision},
        "data": {"path": str(folder), "caption_prefix": prefix},
        "sample": {"prompts": prompts},
        "optimizer": {"name": "adamw", "lr": lr},
        "output": {"dir": "/tmp/run"},
    }
    recipe = Recipe.model_validate(values)
    (folder / "written.yaml").write_text(recipe.to_yaml(), encoding="utf-8", newline="")
    assert load_recipe(folder / "written.yaml") == recipe


SCHEMA = SchemaTree(json_schema())
FIELDS = sorted({path[:end] for path, _ in SCHEMA.fields() for end in range(1, len(path) + 1)})
JUNK = st.recursive(
    st.sampled_from(
        [None, True, -1, 1.5, float("nan"), 10**400, "", "x", "none", "[[", "\0", "x" * 5000, "\ud800"]
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["name", "lr", "x"]), inner),
    max_leaves=3,
)


@settings(deadline=None, max_examples=80)
@given(
    broken=st.dictionaries(st.sampled_from(FIELDS), JUNK, min_size=1, max_size=3),
    overrides=st.lists(
        st.tuples(st.sampled_from(FIELDS), st.sampled_from(["", ".name", ".x"]), JUNK), max_size=2
    ),
)
def test_any_corruption_raises_recipe_error_or_loads(
    tmp_path_factory: pytest.TempPathFactory, broken: dict, overrides: list
) -> None:
    folder = tmp_path_factory.getbasetemp()
    values = yaml.safe_load(SMALL) | {"data": {"path": str(folder)}}
    for path, value in broken.items():
        section = values
        for key in path[:-1]:
            section[key] = section[key] if isinstance(section.get(key), dict) else {}
            section = section[key]
        section[path[-1]] = value
    (folder / "broken.yaml").write_text(yaml.safe_dump(values))
    texts = [f"{'.'.join(path)}{more}={json.dumps(value)}" for path, more, value in overrides]
    try:
        recipe = load_recipe(folder / "broken.yaml", texts)
    except RecipeError as error:
        lines = str(error).splitlines()
        assert all(line.startswith((f"{folder}/broken.yaml:", "command line: ")) for line in lines)
    else:
        assert isinstance(recipe, Recipe)


def test_differences_name_the_fields_with_both_values(write: Write) -> None:
    path = write(SMALL)
    long = "x" * 80
    before = load_recipe(path, [f"sample.prompts=[{long}1]"])
    after = load_recipe(
        path,
        ["train.seed=7", "objective.loss={name: huber}", "lora.targets=[a]", f"sample.prompts=[{long}2]"],
    )
    lines = differences(before, after)
    assert lines[:2] == ["lora.targets: 'all-linear' -> [\"a\"]", "objective.loss.name: 'mse' -> 'huber'"]
    assert lines[2] == "train.seed: 0 -> 7"
    assert lines[3].startswith("sample.prompts: ")
    assert lines[4:] == ["objective.loss.delta: absent -> 0.1"]


def test_text_that_yaml_1_1_or_1_2_would_misread_is_quoted() -> None:
    for text in ("1e5", "0o17", "yes", "1:30", "010"):
        assert yaml.dump([text], Dumper=RecipeDumper).strip() == f"- '{text}'"
