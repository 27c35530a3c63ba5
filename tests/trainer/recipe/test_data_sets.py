"""Tests of `data.sets`: inherited settings, the number of samples, contradictions, and comparing two recipes."""

from pathlib import Path

import pytest

from halfbyte.trainer.recipe.data_section import (
    DataSection,
    common_prefix,
    common_trigger,
    instance_prompt,
    set_uses,
)
from halfbyte.trainer.recipe.load import load_recipe, load_written
from halfbyte.trainer.recipe.recipe import differences

from small_recipe import Write, problems

RECIPE = """\
model: {family: flux, path: owner/name}
data:
  resolution: [512, 1024]
  caption_prefix: photo of
  sets:
    - path: ./pictures
      repeats: 10
      caption_prefix: sks dog
    - path: ./pictures
      kind: regularization
      loss_weight: 0.5
      resolution: 768
      flip: true
output: {dir: out}
"""


def test_a_set_inherits_the_settings_that_it_does_not_give(write: Write, tmp_path: Path) -> None:
    first, second = load_recipe(write(RECIPE)).data.resolved_sets
    assert first.path == second.path == tmp_path / "pictures"
    assert (first.resolutions, first.flip, first.caption_prefix, first.repeats) == (
        (512, 1024),
        False,
        "sks dog",
        10,
    )
    assert (second.resolutions, second.flip, second.caption_prefix) == ((768,), True, "photo of")
    assert (first.kind, first.loss_weight) == ("train", 1.0)
    assert (second.kind, second.loss_weight) == ("regularization", 0.5)


def test_an_override_of_the_section_reaches_the_sets(write: Write) -> None:
    first, second = load_recipe(write(RECIPE), ["data.resolution=256", "data.flip=true"]).data.resolved_sets
    assert first.resolutions == (256,)
    assert first.flip
    assert second.resolutions == (768,)


def test_one_path_is_one_set(write: Write) -> None:
    text = (
        "model: {family: flux, path: owner/name}\ndata: {path: ./pictures, flip: true}\noutput: {dir: out}\n"
    )
    (only,) = load_recipe(write(text)).data.resolved_sets
    assert (only.setting, only.flip, only.repeats, only.kind) == ("data", True, 1.0, "train")


def test_a_written_recipe_loads_as_an_equal_one(write: Write, tmp_path: Path) -> None:
    recipe = load_recipe(write(RECIPE))
    (tmp_path / "written.yaml").write_text(recipe.to_yaml())
    assert load_written(tmp_path / "written.yaml") == recipe


def test_each_field_of_a_set_is_compared(write: Write) -> None:
    before = load_recipe(write(RECIPE))
    after = load_recipe(
        write(RECIPE.replace("repeats: 10", "repeats: 4").replace("flip: true", "flip: false"))
    )
    assert differences(before, after) == [
        "data.sets[0].repeats: 10.0 -> 4.0",
        "data.sets[1].flip: true -> false",
    ]


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "words"),
    [
        ("repeats: 10", "repeats: 0", 7, "data.sets[0].repeats", "positive"),
        ("repeats: 10", "weight: 1", 9, "data.sets[1].weight", "missing"),
        ("repeats: 10", "repeats: 10\n      weight: 2", 7, "data.sets[0].repeats", "weight 2"),
        ("repeats: 10", "repeat: 10", 7, "data.sets[0].repeat", "did you mean 'repeats'"),
        ("kind: regularization", "kind: reg", 10, "data.sets[1].kind", "train or regularization"),
        ("flip: true", "random_crops: 3", 13, "data.sets[1].random_crops", "crop is center"),
        ("resolution: 768", "resolution: 500", 12, "data.sets[1].resolution", "divisible by 16"),
        ("resolution: [512, 1024]", "resolution: []", 3, "data.resolution", "divisible by 16"),
        (
            "    - path: ./pictures\n      repeats",
            "    - path: ./nowhere\n      repeats",
            6,
            "data.sets[0].path",
            "nowhere",
        ),
        ("  resolution: [512, 1024]", "  path: ./pictures", 3, "data.path", "data.sets"),
    ],
)
def test_a_problem_names_the_field_of_the_set(write: Write, old, new, line, field, words) -> None:
    assert RECIPE.count(old) == 1
    (problem,) = problems(write(RECIPE.replace(old, new)))
    assert problem.startswith(f"recipe.yaml:{line}: {field}: ")
    assert words in problem


def test_only_regularization_is_refused(write: Write) -> None:
    (problem,) = problems(write(RECIPE.replace("repeats: 10", "kind: regularization")))
    assert problem.startswith("recipe.yaml:5: data.sets: ")


def test_sections_that_are_no_list_are_refused(write: Write) -> None:
    (problem,) = problems(write(RECIPE), "data.sets=3")
    assert problem.startswith("command line: data.sets=3: ")
    assert "[{path: ...}" in problem


def of(*sets: dict[str, object]) -> DataSection:
    return DataSection.model_validate({"sets": [{"path": Path("x"), **given} for given in sets]})


def test_repeats_and_weights_give_the_samples_of_an_epoch() -> None:
    assert set_uses(of({"repeats": 3.0}, {"repeats": 0.5}, {}).resolved_sets, [10, 7, 4]) == [30, 4, 4]
    assert set_uses(of({"weight": 3.0}, {"weight": 1.0}).resolved_sets, [20, 980]) == [750, 250]
    assert set_uses(of({"weight": 1e-9}, {"weight": 1.0}).resolved_sets, [5, 5]) == [1, 10]


def test_a_prefix_is_common_if_all_trained_sets_have_it() -> None:
    regularization = {"kind": "regularization"}
    assert common_prefix(of({"caption_prefix": "sks "}, regularization)) == "sks"
    assert common_prefix(of({"caption_prefix": "sks"}, {"caption_prefix": "other"}, regularization)) == ""


def test_the_trigger_word_calls_what_was_trained() -> None:
    regularization = {"kind": "regularization"}
    data = of({"trigger_word": " sks ", "caption_prefix": "a photo of [trigger],"}, regularization)
    assert (common_trigger(data), common_prefix(data)) == ("sks", "a photo of sks,")
    assert instance_prompt(data) == "sks"
    assert instance_prompt(of({"caption_prefix": "a photo of"}, regularization)) == "a photo of"
    assert instance_prompt(of({"trigger_word": "sks"}, {"trigger_word": "zwx"})) == ""


def test_a_set_of_regularization_images_does_not_inherit_the_trigger_word(write: Write) -> None:
    text = RECIPE.replace("  caption_prefix: photo of\n", "  trigger_word: sks\n")
    first, second = load_recipe(write(text)).data.resolved_sets
    assert (first.trigger_word, second.trigger_word) == ("sks", "")


@pytest.mark.parametrize(
    "override",
    ["data.keep_tags=1", "data.caption_variants=0", "data.tag_dropout=1.5", "data.tag_separator=''"],
)
def test_a_tag_setting_that_cannot_work_is_refused(write: Write, override: str) -> None:
    (problem,) = problems(write(RECIPE), override)
    assert problem.startswith(f"command line: {override}: ")


def test_kept_tags_of_a_set_without_tags_are_refused(write: Write) -> None:
    (problem,) = problems(write(RECIPE.replace("repeats: 10", "keep_tags: 2")))
    assert problem.startswith("recipe.yaml:7: data.sets[0].keep_tags: got 2, expected 0")


def test_keep_tags_of_the_section_is_for_the_sets_with_tags(write: Write) -> None:
    text = RECIPE.replace("flip: true", "shuffle_tags: true")
    first, second = load_recipe(write(text), ["data.keep_tags=2"]).data.resolved_sets
    assert (first.varies_tags, second.varies_tags, second.keep_tags) == (False, True, 2)
