"""Whole runs over several captions and shuffled tags: reported, planned, resumed bitwise identically or refused."""

import pytest
from rich.console import Console
from typer.testing import CliRunner

from halfbyte.trainer.cli.app import app
from halfbyte.trainer.data.cache.encodings import TextCache
from halfbyte.trainer.errors import DataError, RecipeError

from runs import results, run_here, write_recipe

SETTINGS = (
    "data.caption_lines=true",
    "data.shuffle_tags=true",
    "data.keep_tags=1",
    "data.tag_dropout=0.2",
    "data.caption_variants=6",
    "data.trigger_word=sks",
    "data.caption_dropout=0.1",
    "validation.held_out=1",
    "sample.prompts=[]",
    "output.export_base=false",
)


def recipe_in(folder, model):
    folder.mkdir(exist_ok=True)
    recipe = write_recipe(folder, model)
    for number, file in enumerate(sorted((folder / "pictures").glob("*.txt"))):
        file.write_text(f"card {number}, red, green, blue\nnumber {number}, ramp, wide, soft")
    (folder / "pictures" / "picture0.mask.png").write_bytes(
        (folder / "pictures" / "picture0.png").read_bytes()
    )
    return recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory, mini_flux):
    recipe = recipe_in(tmp_path_factory.mktemp("captions"), mini_flux)
    with (recipe.parent / "output.txt").open("w") as output:
        run_here(recipe, *SETTINGS, console=Console(file=output, width=300))
    return recipe


def cached_texts(whole):
    store = TextCache.store(whole.parent / "cache")
    store.refresh(again=True)
    return len(store)


def test_the_report_counts_captions_and_what_is_left_out(whole):
    lines = (whole.parent / "output.txt").read_text().splitlines()
    (data,) = [line for line in lines if line.startswith("data ")]
    (captions,) = [line for line in lines if line.startswith("captions ")]
    assert "5 images" in data
    assert "left out: masks: 1 (picture0.mask.png)" in data
    # Every text is in the cache: up to 6 of 5 images, the caption of the one held out, the empty one.
    cached = cached_texts(whole)
    assert f" {cached} different texts" in captions
    assert 20 < cached <= 32
    assert "tags shuffled, 1 kept, 20% dropped" in captions


def test_the_plan_counts_the_same_captions(whole):
    result = CliRunner().invoke(app, ["plan", str(whole), *SETTINGS])
    assert result.exit_code == 0, result.output
    cached = cached_texts(whole)
    assert "5 images" in result.output
    assert f"{cached} captions to encode" in " ".join(result.output.split())


def test_it_resumes_bitwise_identically(whole, tmp_path, mini_flux):
    recipe = recipe_in(tmp_path / "again", mini_flux)
    run_here(recipe, *SETTINGS, "train.steps=2")
    run_here(recipe, *SETTINGS, resume=True)
    (losses, _, adapter), (expected, _, whole_adapter) = (
        results(folder / "run") for folder in (recipe.parent, whole.parent)
    )
    # Both runs measure the validation loss where they stop.
    assert [row[:4] for row in losses] == [row[:4] for row in expected]
    assert adapter == whole_adapter


def test_shuffling_changes_the_training_but_not_the_validation_before_it(whole, tmp_path, mini_flux):
    recipe = recipe_in(tmp_path / "plain", mini_flux)
    run_here(recipe, *SETTINGS, "data.shuffle_tags=false", "train.steps=1")
    losses, validation, _ = results(recipe.parent / "run")
    expected, measured, _ = results(whole.parent / "run")
    assert losses[0] != expected[0]
    assert validation[0] == measured[0]


def test_a_changed_second_caption_is_refused(whole):
    file = whole.parent / "pictures" / "picture1.txt"
    text = file.read_text()
    file.write_text(text.replace("soft", "hard"))
    try:
        with pytest.raises(DataError, match=r"1 caption changed: picture1\.png"):
            run_here(whole, *SETTINGS, "train.steps=6", resume=True)
    finally:
        file.write_text(text)


def test_other_tag_settings_are_refused(whole):
    with pytest.raises(RecipeError, match=r"data\.tag_dropout: 0\.2 -> 0\.5"):
        run_here(whole, *SETTINGS, "data.tag_dropout=0.5", "train.steps=6", resume=True)


def test_a_placeholder_in_a_prompt_is_refused_before_anything_is_read(tmp_path, mini_flux):
    recipe = recipe_in(tmp_path / "prompt", mini_flux)
    with pytest.raises(RecipeError, match=r"sample\.prompts\[0\]"):
        run_here(recipe, *SETTINGS, "sample.prompts=['a [trigger]']")
    assert not (tmp_path / "prompt" / "cache" / "texts").exists()
