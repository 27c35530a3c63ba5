"""Resumed runs: bitwise identical to an uninterrupted run, and refused where they cannot be."""

import shutil
import signal
import time

import pytest
from safetensors.torch import load_file

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.export.export import ADAPTER_FILE
from halfbyte.trainer.optim.schedules import Cosine
from halfbyte.trainer.recipe.load import load_written
from halfbyte.trainer.training.metrics import read_metrics

from runs import run_here, write_recipe


def losses(folder):
    return [(row.step, row.loss, row.grad_norm, row.lr) for row in read_metrics(folder / "metrics.csv")]


def assert_same(one, other):
    assert losses(one) == losses(other)
    left, right = (load_file(folder / "adapter" / ADAPTER_FILE) for folder in (one, other))
    assert left.keys() == right.keys()
    assert all(left[name].equal(right[name]) for name in left)


STEPS = (
    "train.steps=12",
    "checkpoint.every=4",
    "lora.dropout=0.1",
    "data.caption_dropout=0.3",
    "lr_schedule={name: cosine, warmup_steps: 3}",
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, mini_flux):
    folder = tmp_path_factory.mktemp("whole")
    return run_here(write_recipe(folder, mini_flux), *STEPS)


def test_the_learning_rate_follows_its_schedule(uninterrupted):
    recipe = load_written(uninterrupted / "recipe.yaml")
    schedule = Cosine(name="cosine", warmup_steps=3)
    expected = [recipe.optimizer.lr * schedule.factor(step, 12) for step in range(12)]
    assert [row.lr for row in read_metrics(uninterrupted / "metrics.csv")] == pytest.approx(expected)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_resumes_bitwise_identically(tmp_path, mini_flux, uninterrupted, server, how):
    recipe = write_recipe(tmp_path, mini_flux)
    # Sampling at every step slows the run down, so the signal arrives before it ends.
    process = server.start("train", str(recipe), *STEPS, "sample.every=1", "sample.steps=20")
    process.wait_for(tmp_path / "run" / "checkpoints" / "step-000004")
    process.send(how)
    code = process.wait()
    assert not (tmp_path / "run" / "adapter").exists(), "the run ended before it was stopped"
    if how == signal.SIGTERM:
        assert code == 143, process.errors
        assert "--resume" in process.output
    run_here(recipe, *STEPS, resume=True)
    assert_same(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_before_its_first_step_reports_the_interruption(tmp_path, mini_flux, server, how):
    recipe = write_recipe(tmp_path, mini_flux)
    # Enough noise levels for some seconds of validation before training.
    levels = ",".join(f"{level / 400:g}" for level in range(1, 400))
    settings = (*STEPS, "validation.held_out=1", f"validation.sigmas=[{levels}]")
    process = server.start("train", str(recipe), *settings)
    process.wait_for_output("ready after")
    time.sleep(1)
    process.send(how)
    assert process.wait() == 128 + how, process.errors
    last = process.errors.splitlines()[-1]
    assert last == ("error: interrupted" if how == signal.SIGINT else "error: stopped by SIGTERM")
    assert "Traceback" not in process.errors
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_a_finished_run_resumed_changes_nothing(tmp_path, mini_flux):
    recipe = write_recipe(tmp_path, mini_flux)
    folder = run_here(recipe)
    shutil.copytree(folder, tmp_path / "before")
    run_here(recipe, resume=True)
    assert_same(tmp_path / "before", folder)


def test_more_steps_continue_where_the_run_ended(tmp_path, mini_flux):
    recipe = write_recipe(tmp_path, mini_flux)
    run_here(recipe, "train.steps=2", "output.dir=" + str(tmp_path / "grown"))
    grown = run_here(recipe, "train.steps=4", "output.dir=" + str(tmp_path / "grown"), resume=True)
    assert_same(run_here(recipe), grown)


def test_a_changed_recipe_may_not_resume(tmp_path, mini_flux):
    recipe = write_recipe(tmp_path, mini_flux)
    run_here(recipe, "train.steps=2")
    with pytest.raises(RecipeError, match=r"optimizer\.lr"):
        run_here(recipe, "train.steps=4", "optimizer.lr=0.5", resume=True)


def test_a_finished_folder_is_not_overwritten(tmp_path, mini_flux):
    recipe = write_recipe(tmp_path, mini_flux)
    folder = run_here(recipe, "train.steps=2")
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    with pytest.raises(RecipeError, match="--resume"):
        run_here(recipe)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
