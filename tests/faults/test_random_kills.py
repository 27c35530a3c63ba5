"""Tests runs of one and two processes that are killed at random times: resumed, they end as if nothing had happened."""

import contextlib
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest

from kill_points import leftovers
from runs import results, write_recipe
from soak import parts, report, share, tries

SETTINGS = (
    "train.steps=8",
    "sample.prompts=[]",
    "validation.held_out=1",
    "validation.every=2",
    "lora.dropout=0.1",
)


def start(server, ranks, recipe, *arguments):
    if ranks == 1:
        return [server.start("train", str(recipe), *SETTINGS, *arguments)]
    return server.start_ranks(ranks, "train", str(recipe), *SETTINGS, "train.grad_accumulation=1", *arguments)


@pytest.fixture
def output(tmp_path, part):
    """The folder for the run's output: in every other part on another file system than the cache."""
    shared_memory = Path("/dev/shm")
    if part % 2 == 0 or not shared_memory.is_dir():
        yield tmp_path / "killed" / "run"
        return
    with tempfile.TemporaryDirectory(dir=shared_memory) as folder:
        yield Path(folder) / "run"


@pytest.mark.parametrize("part", parts())
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_and_resumed_a_run_ends_the_same(server, tmp_path, mini_flux, output, ranks, part):
    draws, kills, lost = random.Random(f"{ranks}/{part}"), 0, 0
    (tmp_path / "whole").mkdir()
    began = time.monotonic()
    for process in start(server, ranks, write_recipe(tmp_path / "whole", mini_flux)):
        assert process.wait() == 0, process.errors
    duration = time.monotonic() - began
    expected = results(tmp_path / "whole" / "run")
    (tmp_path / "killed").mkdir()
    recipe = write_recipe(tmp_path / "killed", mini_flux)
    run = output
    wanted = len(share(range(tries("KILLS", 2)), part))
    while kills < wanted:
        for folder in (run, tmp_path / "killed" / "cache"):
            shutil.rmtree(folder, ignore_errors=True)
        finished = False
        while not finished:
            resume = ["--resume"] if (run / "recipe.yaml").exists() else []
            processes = start(server, ranks, recipe, f"output.dir={run}", *resume)
            if kills < wanted:
                time.sleep(draws.uniform(0.1, duration))
                for process in processes:
                    with contextlib.suppress(ProcessLookupError):  # it has ended just now
                        process.send(signal.SIGKILL)
            codes = [process.wait() for process in processes]
            kills += -signal.SIGKILL in codes
            finished = codes == [0] * ranks
            assert all(code in (0, -signal.SIGKILL) for code in codes), [p.errors for p in processes]
        lost += results(run) != expected or bool(leftovers(run))
    where = "on other file systems" if run.stat().st_dev != tmp_path.stat().st_dev else "on one file system"
    report(f"random kills, processes: {ranks}, output and cache {where}", tried=kills, lost=lost)
    assert lost == 0
