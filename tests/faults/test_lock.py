"""Tests that two processes never write into the folder of one run."""

import os
import signal

import pytest

from halfbyte.trainer.errors import DiskError, RecipeError
from halfbyte.trainer.run_folder.lock import LOCK_FILE, lock_run

from kill_points import leftovers
from run_server import SLOW_STEPS
from runs import results, run_here, write_recipe


def test_a_second_run_names_the_process_that_holds_the_folder(server, tmp_path, mini_flux):
    recipe = write_recipe(tmp_path, mini_flux)
    process = server.start("train", str(recipe), "train.steps=60", before=SLOW_STEPS)
    process.wait_for(tmp_path / "run" / "checkpoints" / "step-000002")
    for resume in (False, True):
        with pytest.raises(RecipeError, match=f"process {process.pid} on ") as refused:
            run_here(recipe, "train.steps=60", resume=resume)
        assert "--resume" not in str(refused.value), "advice that would end both runs"
    # The first run goes on, and a killed run does not keep the folder.
    assert process.poll() is None
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run_here(recipe, "train.steps=4", "checkpoint.every=2", resume=True)
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_a_refused_run_leaves_no_folder(tmp_path, mini_flux):
    recipe = write_recipe(tmp_path, mini_flux)
    with pytest.raises(RecipeError):
        run_here(recipe, "model.path=./nowhere", f"output.dir={tmp_path / 'new' / 'run'}")
    assert not (tmp_path / "new").exists()


def test_a_lock_can_be_taken_again_after_it_was_freed(tmp_path):
    for _ in range(3):
        with (
            lock_run(tmp_path / "run"),
            pytest.raises(RecipeError, match=str(os.getpid())),
            lock_run(tmp_path / "run"),
        ):
            raise AssertionError
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["/dev/null/run", "/proc/run"])
def test_a_place_that_holds_no_folders_is_refused_before_encoding(tmp_path, mini_flux, where):
    recipe = write_recipe(tmp_path, mini_flux)
    with pytest.raises((DiskError, RecipeError), match=r"output\.dir"):
        run_here(recipe, f"output.dir={where}")
    assert not (tmp_path / "cache").exists()


def test_two_runs_share_a_cold_cache(server, tmp_path, mini_flux):
    recipes = [write_recipe(tmp_path, mini_flux, name=name) for name in ("one", "other")]
    processes = [server.start("train", str(recipe), "sample.prompts=[]") for recipe in recipes]
    for process in processes:
        assert process.wait() == 0, process.errors
        assert "damaged" not in process.errors, process.errors
    one, other = (results(tmp_path / recipe.stem) for recipe in recipes)
    assert one == other
    assert leftovers(tmp_path / "cache") == []
