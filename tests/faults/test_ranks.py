"""Tests a process of a run that is killed, stopped or fails: the others end soon, and one line names it."""

import os
import signal
import time

import pytest

from halfbyte.trainer.errors import ProcessLost
from halfbyte.trainer.run_folder import checkpoint
from halfbyte.trainer.runtime.world import end_with_launcher

from run_server import SLOW_STEPS
from runs import run_here, write_recipe

PATIENCE = {"HALFBYTE_RANK_TIMEOUT": "8"}


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_lost_process_is_named_and_the_other_ends(server, tmp_path, mini_flux, lost, number):
    recipe = write_recipe(tmp_path, mini_flux)
    processes = server.start_ranks(
        2, "train", str(recipe), "train.steps=200", environ=PATIENCE, before=SLOW_STEPS
    )
    processes[0].wait_for(tmp_path / "run" / "checkpoints" / "step-000002")
    gone, left = processes[lost], processes[1 - lost]
    gone.send(number)
    assert left.wait(60) == ProcessLost.exit_code, left.errors
    lines = [line for line in left.errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, left.errors
    assert f"process {lost} (on " in lines[0]
    assert f"process id {gone.pid})" in lines[0]
    assert "--resume" in lines[0]
    assert "Traceback" not in left.errors
    if number == signal.SIGSTOP:
        os.kill(gone.pid, signal.SIGKILL)
    gone.wait(30)
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert saved is not None


WAITING = """
import pathlib, time
from halfbyte.trainer.families.encoders import PipelineEncoders
from halfbyte.trainer.runtime.world import read_world
real = PipelineEncoders.encode_texts
def paused(*arguments):
    if read_world().is_leader:
        pathlib.Path({reached!r}).touch()
        time.sleep(600)
    return real(*arguments)
PipelineEncoders.encode_texts = paused
"""


def test_a_process_that_waits_for_another_can_be_stopped(server, tmp_path, mini_flux):
    recipe, reached = write_recipe(tmp_path, mini_flux), tmp_path / "reached"
    leader, other = server.start_ranks(2, "train", str(recipe), before=WAITING.format(reached=str(reached)))
    leader.wait_for(reached)
    other.send(signal.SIGTERM)
    assert other.wait(30) == 128 + signal.SIGTERM, other.errors
    leader.send(signal.SIGINT)
    assert leader.wait(30) == 128 + signal.SIGINT, leader.errors
    assert "Traceback" not in leader.errors + other.errors


def test_an_error_of_the_leader_is_printed_once_and_ends_all(server, tmp_path, mini_flux):
    recipe = write_recipe(tmp_path, mini_flux)
    run_here(recipe, "train.steps=2")
    processes = server.start_ranks(2, "train", str(recipe), "train.steps=2")
    assert [process.wait(60) for process in processes] == [2, 2]
    assert sum(process.errors.count("error: ") for process in processes) == 1


def test_a_process_ends_when_its_launcher_is_killed(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    reader, writer = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, lambda number, frame: (os.write(writer, b"stopped"), os._exit(0)))
            end_with_launcher()
            os.write(writer, b"ready ")
            time.sleep(60)
        time.sleep(60)
        os._exit(1)
    os.close(writer)
    assert os.read(reader, 100) == b"ready "
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert os.read(reader, 100) == b"stopped"
    os.close(reader)
