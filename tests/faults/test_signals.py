"""Tests stopping signals in every phase of a run: the state is saved, and the exit code names the signal."""

import signal

import pytest

from halfbyte.trainer.export.export import ADAPTER_FILE
from halfbyte.trainer.run_folder import checkpoint

from run_server import SLOW_STEPS
from runs import run_here, write_recipe

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

# Stops a run at a place in the code until the test has sent its signal.
PAUSED = """
import pathlib, time
from {module} import {name}
real = {name}.{method}
def paused(*arguments, **options):
    result = real(*arguments, **options)
    pathlib.Path({reached!r}).touch()
    for _ in range(600):
        time.sleep(0.1)
    return result
{name}.{method} = paused
"""


def pause(module, name, method, reached):
    return PAUSED.format(module=module, name=name, method=method, reached=str(reached))


def assert_nothing_left(folder):
    """Checks that a run has left no temporary file or folder, and no lock."""
    hidden = [path for path in folder.rglob(".*") if path.name != ".cache"]
    assert not hidden, hidden


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_a_signal_during_a_step_saves_a_checkpoint(server, tmp_path, mini_flux, number):
    recipe = write_recipe(tmp_path, mini_flux)
    process = server.start("train", str(recipe), "train.steps=60", "checkpoint.every=2", before=SLOW_STEPS)
    process.wait_for(tmp_path / "run" / "checkpoints" / "step-000002")
    process.send(number)
    assert process.wait() == 128 + number, process.errors
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert f"at step {saved.position.step} of 60; continue with --resume" in process.output
    assert "Traceback" not in process.errors
    assert_nothing_left(tmp_path / "run")


PHASES = {
    "encoding": ("halfbyte.trainer.families.encoders", "PipelineEncoders", "encode_texts"),
    "first samples": ("halfbyte.trainer.sample.sampler", "PictureSampler", "draw"),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_before_the_first_step_ends_the_run_with_one_line(
    server, tmp_path, mini_flux, phase, number
):
    recipe, reached = write_recipe(tmp_path, mini_flux), tmp_path / "reached"
    process = server.start("train", str(recipe), before=pause(*PHASES[phase], reached))
    process.wait_for(reached)
    process.send(number)
    assert process.wait(30) == 128 + number, process.errors
    assert process.errors.splitlines()[-1] == f"error: stopped by {number.name}"
    assert "Traceback" not in process.errors
    if (tmp_path / "run").exists():
        assert_nothing_left(tmp_path / "run")
    # The next start needs no --resume where nothing has been written, and trains to the end.
    assert run_here(recipe, "train.steps=2", resume=(tmp_path / "run").exists())


EXPORTING = """
import pathlib, time
from halfbyte.trainer.export import export
real = export.write_provenance
def paused(*arguments):
    real(*arguments)
    pathlib.Path({reached!r}).touch()
    time.sleep(60)
export.write_provenance = paused
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_during_the_export_ends_the_run_and_leaves_its_checkpoint(
    server, tmp_path, mini_flux, number
):
    recipe, reached = write_recipe(tmp_path, mini_flux), tmp_path / "reached"
    process = server.start("train", str(recipe), before=EXPORTING.format(reached=str(reached)))
    process.wait_for(reached)
    process.send(number)
    assert process.wait(30) == 128 + number, process.errors
    assert process.errors.splitlines()[-1] == f"error: stopped by {number.name}"
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.position.step == 4
    assert_nothing_left(tmp_path / "run")
    assert (run_here(recipe, resume=True) / "adapter" / ADAPTER_FILE).is_file()


def test_a_second_signal_ends_the_step(server, tmp_path, mini_flux):
    recipe, reached = write_recipe(tmp_path, mini_flux), tmp_path / "reached"
    module = ("halfbyte.trainer.training.module", "DiffusionModule", "loss")
    process = server.start("train", str(recipe), before=pause(*module, reached))
    process.wait_for(reached)
    process.send(signal.SIGTERM)
    process.send(signal.SIGTERM)
    # Python may handle both at once, as one signal: send another.
    if process.poll() is None:
        process.send(signal.SIGHUP)
    assert process.wait(30) in (128 + signal.SIGTERM, 128 + signal.SIGHUP), process.errors
    assert "Traceback" not in process.errors


def test_a_signal_to_one_of_two_processes_stops_both(server, tmp_path, mini_flux):
    recipe = write_recipe(tmp_path, mini_flux)
    leader, other = server.start_ranks(2, "train", str(recipe), "train.steps=60", before=SLOW_STEPS)
    leader.wait_for(tmp_path / "run" / "checkpoints" / "step-000002")
    other.send(signal.SIGTERM)
    assert (leader.wait(30), other.wait(30)) == (143, 143), leader.errors + other.errors
    assert "continue with --resume" in leader.output
    assert "Traceback" not in leader.errors + other.errors
