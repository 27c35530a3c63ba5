"""Plans of runs with a batch size for each resolution: the peak over them, and the mean of their times."""

from pathlib import Path

import pytest

from halfbyte.trainer.plan.fit import cheapest_savings, open_planner
from halfbyte.trainer.plan.phases import RunPlan
from halfbyte.trainer.plan.planner import Planner
from halfbyte.trainer.recipe.load import load_recipe

from runs import write_recipe

SIZES = "data.resolution=[32, 64]"


@pytest.fixture
def toy(tmp_path: Path, mini_flux: Path) -> Path:
    return write_recipe(tmp_path, mini_flux)


def planner_of(toy: Path, *settings: str) -> Planner:
    return open_planner(load_recipe(toy, settings))


def plan_of(toy: Path, *settings: str) -> RunPlan:
    return planner_of(toy, *settings).plan()


def test_the_peak_is_that_of_the_largest_micro_batch(toy: Path) -> None:
    small, large = (
        plan_of(toy, f"data.resolution={side}", f"train.batch_size={size}")
        for side, size in ((32, 40), (64, 1))
    )
    assert small.phase("step").allocated > large.phase("step").allocated
    both = planner_of(toy, SIZES, "train.batch_size={32: 40, 64: 1}")
    assert both.plan().phase("step").device == small.phase("step").device
    assert both.largest_batch(both.recipe).resolution == 32
    assert any("32 px" in note for note in both.plan().notes)
    other = plan_of(toy, SIZES, "train.batch_size={32: 1, 64: 1}")
    assert other.phase("step").device == large.phase("step").device


def test_the_time_is_the_mean_over_the_micro_batches(toy: Path) -> None:
    """Each image is trained at both sizes: with 4 and 1, a fifth of the micro-batches has the small ones."""
    small, large = (
        plan_of(toy, f"data.resolution={side}", f"train.batch_size={size}")
        for side, size in ((32, 4), (64, 1))
    )
    both = plan_of(toy, SIZES, "train.batch_size={32: 4, 64: 1}")
    assert both.step.flops == pytest.approx(0.2 * small.step.flops + 0.8 * large.step.flops, rel=1e-6)
    assert both.seen == round(4 * 2 * (0.2 * 4 + 0.8 * 1))
    assert both.epoch == 12


def test_one_number_for_several_resolutions_has_the_peak_of_the_largest(toy: Path) -> None:
    both, large = (
        plan_of(toy, f"data.resolution={given}", "train.batch_size=2") for given in ("[32, 64]", "64")
    )
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
