"""Tests stopping signals to one or both processes of a run, in every phase, single and double."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from halfbyte.trainer.errors import ProcessLost
from halfbyte.trainer.run_folder.folder import RunFolder
from halfbyte.trainer.runtime.signals import STOPPING

from run_server import Command, RunServer
from runs import run_here, write_recipe
from soak import parts, report, share, tries

SETTINGS = ("train.steps=3", "train.grad_accumulation=1", "validation.held_out=1", "validation.every=2")

# Stops both processes in a function, once it has returned and until the test has sent its signals.
PAUSED = """
import pathlib, time
from {module} import {owner}
from halfbyte.trainer.runtime.world import read_world
real = {owner}.{function}
def paused(*arguments, **options):
    result = real(*arguments, **options)
    place = pathlib.Path({reached!r} + str(read_world().rank))
    if not place.exists():
        place.touch()
        for _ in range(300):
            time.sleep(0.1)
            if pathlib.Path({reached!r}).exists():
                break
    return result
{owner}.{function} = paused
"""
PHASES = {
    "encoding": ("halfbyte.trainer.families.encoders", "PipelineEncoders", "encode_texts"),
    "loading": ("halfbyte.trainer.denoiser", "load", "load_run_base"),
    "a step": ("halfbyte.trainer.training.module", "DiffusionModule", "loss"),
    "validation": ("halfbyte.trainer.training.validation", "Validation", "predictions"),
}


@dataclass(frozen=True)
class Case:
    """Signals to some of two processes, in one phase."""

    phase: str
    ranks: Sequence[int]  # processes that get the signal
    number: signal.Signals
    twice: bool


ALL = [
    Case(phase, ranks, number, twice)
    for phase, ranks, number, twice in product(PHASES, ((0,), (1,), (0, 1)), STOPPING, (False, True))
]
SHORT = [Case("encoding", (1,), signal.SIGUSR1, True)]  # test_signals.py has one during steps
CASES = ALL if tries("ALL_SIGNALS", 0) else SHORT


def check(server: RunServer, folder: Path, model: Path, case: Case) -> None:
    folder.mkdir()
    recipe, reached = write_recipe(folder, model), folder / "reached"
    module, owner, function = PHASES[case.phase]
    before = PAUSED.format(module=module, owner=owner, function=function, reached=str(reached))
    processes = server.start_ranks(2, "train", str(recipe), *SETTINGS, before=before)
    for rank, process in enumerate(processes):
        process.wait_for(folder / f"reached{rank}")
    for _ in range(1 + case.twice):
        for rank in case.ranks:
            if processes[rank].poll() is None:
                processes[rank].send(case.number)
    reached.touch()
    codes = [process.wait(30) for process in processes]
    stopped = 128 + case.number
    assert all(codes[rank] == stopped for rank in case.ranks), (case, said(processes))
    assert set(codes) <= {stopped, ProcessLost.exit_code}, (case, said(processes))
    for process in processes:
        assert "Traceback" not in process.errors, (case, process.errors)
    root = RunFolder(folder / "run")
    hidden = [path for path in root.root.rglob(".*") if path.name != ".cache"] if root.root.exists() else []
    assert not hidden or case.twice, (case, hidden)
    assert run_here(recipe, *SETTINGS, "train.batch_size=2", resume=root.recipe.exists())


def said(processes: Sequence[Command]) -> list[str]:
    return [f"exit {process.poll()}: {process.errors}" for process in processes]


@pytest.mark.parametrize("part", parts())
def test_both_processes_end_and_the_run_can_go_on(
    server: RunServer, tmp_path: Path, mini_flux: Path, part: int
) -> None:
    chosen = share(CASES, part)
    for number, case in enumerate(chosen):
        check(server, tmp_path / str(number), mini_flux, case)
    report("signals to one or both of two processes", tried=len(chosen), wrong_ends=0)
