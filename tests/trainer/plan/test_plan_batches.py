"""Plans of runs with a batch size for each resolution: the peak over them, and the mean of their times."""

from pathlib import Path

import pytest

from halfbyte.trainer.plan.fit import cheapest_savings, open_planner
from halfbyte.trainer.plan.planner import Planner
from halfbyte.trainer.recipe.load import load_recipe

from runs import write_recipe

SMALL, LARGE = ("data.resolution=32", "train.batch_size=40"), ("data.resolution=64", "train.batch_size=1")
MIXED = ("data.resolution=[32, 64]", "train.batch_size={32: 40, 64: 1}")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, mini_flux: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("batches"), mini_flux)


@pytest.fixture(scope="module")
def planners(toy: Path) -> list[Planner]:
    """Planners of each resolution with its batch size, and of both."""
    return [open_planner(load_recipe(toy, settings)) for settings in (SMALL, LARGE, MIXED)]


def test_the_peak_is_that_of_the_largest_micro_batch(planners: list[Planner]) -> None:
    small, large, both = (planner.plan() for planner in planners)
    assert small.phase("step").allocated > large.phase("step").allocated
    assert both.phase("step").device == small.phase("step").device
    assert planners[2].largest_batch(planners[2].recipe).resolution == 32
    assert any("32 px" in note for note in both.notes)


def test_the_time_is_the_mean_over_the_micro_batches(planners: list[Planner]) -> None:
    """Each image is trained at both sizes: with 40 and 1, 1 of 41 micro-batches has the small ones."""
    small, large, both = (planner.plan() for planner in planners)
    assert both.step.flops == pytest.approx((small.step.flops + 40 * large.step.flops) / 41, rel=1e-6)
    assert both.seen == round(4 * 2 * (40 + 40) / 41)
    assert both.epoch == 12


def test_one_number_for_several_resolutions_has_the_peak_of_the_largest(
    toy: Path, planners: list[Planner]
) -> None:
    large, both = planners[1].plan(), open_planner(load_recipe(toy, [MIXED[0], LARGE[1]])).plan()
    assert both.phase("step").device == large.phase("step").device
    assert both.step.flops < large.step.flops
    assert both.seen == large.seen


def test_changes_keep_a_batch_size_for_each_resolution(toy: Path) -> None:
    given = ("data.path=./none", "data.resolution=[512, 1024]", "train.batch_size={512: 1, 1024: 2}")
    planner = open_planner(load_recipe(toy, given, pictures_needed=False))
    savings = cheapest_savings(planner, count=99)
    settings = [saving.change.settings for saving in savings]
    assert ["train.batch_size={512: 1, 1024: 1}"] in settings
    assert ["data.resolution=[512, 768]", "train.batch_size={512: 1, 768: 2}"] in settings
    for saving in savings:
        made = load_recipe(toy, [*given, *saving.change.settings], pictures_needed=False)
        assert made.train == saving.change.applied(planner.recipe).train
