"""A whole run over several data sets, sizes and weights: reported, and resumed bitwise identically."""

import pytest
from rich.console import Console

from halfbyte.trainer.errors import RecipeError

from runs import results, run_here, write_pictures, write_recipe

SETS = (
    "sets: [{path: ./pictures, repeats: 2, resolution: [32, 64]},"
    " {path: ./others, kind: regularization, loss_weight: 0.5, caption_prefix: other, flip: true}]"
)


def recipe_in(folder, model):
    folder.mkdir(exist_ok=True)
    recipe = write_recipe(folder, model)
    write_pictures(folder / "others")
    recipe.write_text(recipe.read_text().replace("path: ./pictures", SETS))
    return recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory, mini_flux):
    recipe = recipe_in(tmp_path_factory.mktemp("sets"), mini_flux)
    with (recipe.parent / "output.txt").open("w") as output:
        run_here(recipe, console=Console(file=output, width=300))
    return recipe


def test_the_report_names_each_set(whole):
    output = (whole.parent / "output.txt").read_text()
    first = next(line for line in output.splitlines() if "data 1" in line)
    second = next(line for line in output.splitlines() if "data 2" in line)
    # 6 images of 80 x 72 pixels are each trained at 32 and at 64: 12 views, twice in an epoch; and 6 of the others.
    assert "pictures: 6 images, 12 views x 2, 80% of the samples" in first
    assert "32 px: " in first
    assert "64 px: " in first
    assert "others, regularization: 6 images, 12 views x 1, 20% of the samples, loss weight 0.5" in second
    assert "epochs of 30 samples" in output


def test_it_resumes_bitwise_identically(whole, tmp_path, mini_flux):
    recipe = recipe_in(tmp_path / "again", mini_flux)
    run_here(recipe, "train.steps=2")
    run_here(recipe, resume=True)
    assert results(recipe.parent / "run") == results(whole.parent / "run")


def test_the_weight_changes_the_result(whole, tmp_path, mini_flux):
    recipe = recipe_in(tmp_path / "weight", mini_flux)
    recipe.write_text(recipe.read_text().replace("loss_weight: 0.5, ", ""))
    run_here(recipe, "train.steps=2")
    losses, expected = (results(folder / "run")[0] for folder in (recipe.parent, whole.parent))
    # The third of the four samples is of the second set.
    assert losses[0] == expected[0]
    assert losses[1] != expected[1]


def test_a_resume_with_other_repeats_is_refused(whole):
    whole.write_text(whole.read_text().replace("repeats: 2", "repeats: 3"))
    try:
        with pytest.raises(RecipeError, match=r"data\.sets\[0\]\.repeats: 2\.0 -> 3\.0"):
            run_here(whole, resume=True)
    finally:
        whole.write_text(whole.read_text().replace("repeats: 3", "repeats: 2"))
