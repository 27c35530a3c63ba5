"""A whole run with differential output preservation: bitwise identical when resumed, planned with both predictions."""

import pytest

from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.plan.dry_run import DryRun
from halfbyte.trainer.recipe.load import load_recipe

from runs import results, run_here, write_recipe
from steps import family_at

PRESERVE = "objective.preserve={caption: a picture, weight: 0.5}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, mini_flux):
    recipe = write_recipe(tmp_path_factory.mktemp("preserving"), mini_flux)
    run_here(recipe, PRESERVE, "lora.dropout=0.1")
    return recipe


def test_it_resumes_bitwise_identically(whole, tmp_path, mini_flux):
    recipe = write_recipe(tmp_path, mini_flux)
    run_here(recipe, PRESERVE, "lora.dropout=0.1", "train.steps=2")
    run_here(recipe, PRESERVE, "lora.dropout=0.1", resume=True)
    assert results(tmp_path / "run") == results(whole.parent / "run")


def test_it_changes_what_is_learned_but_not_the_first_loss(whole):
    run_here(whole, "lora.dropout=0.1", "train.steps=2", f"output.dir={whole.parent / 'alone'}")
    alone, preserving = (results(whole.parent / name)[0] for name in ("alone", "run"))
    # B starts at 0, so that nothing has drifted yet. The second step's gradient has changed.
    assert alone[0][1] == pytest.approx(preserving[0][1], rel=1e-5)
    assert alone[1][1] != preserving[1][1]


def test_the_plan_counts_the_second_prediction(whole, mini_flux):
    family = family_at(mini_flux, Flux)
    steps = []
    for overrides in ([], [PRESERVE], ["train.batch_size=2"]):
        recipe = load_recipe(whole, overrides)
        steps.append(DryRun(recipe, family).step(recipe, 64, 64))
    alone, preserving, twice = steps
    assert alone.flops < twice.flops < preserving.flops < 2 * twice.flops
    assert alone.peak.nbytes < preserving.peak.nbytes <= 1.1 * twice.peak.nbytes
