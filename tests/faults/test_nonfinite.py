"""Tests losses and gradients that are NaN: the run stops with its own exit code, or leaves the steps out."""

import math

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.trainer.adapters.lora import trained_parameters
from halfbyte.trainer.errors import NonFiniteError
from halfbyte.trainer.run_folder import checkpoint
from halfbyte.trainer.runtime.world import read_world
from halfbyte.trainer.training.metrics import read_metrics
from halfbyte.trainer.training.module import DiffusionModule

from runs import results, run_here, write_recipe


@pytest.mark.parametrize("log_every", [1, 4])
def test_one_loss_that_is_nan_stops_the_run(tmp_path, mini_flux, monkeypatch, log_every):
    loss = DiffusionModule.loss

    def once(module, batch):
        # The gradients stay finite, as they do in float16, whose scaler skips the step.
        return loss(module, batch) + (math.nan if module.step == 2 else 0.0)

    monkeypatch.setattr(DiffusionModule, "loss", once)
    recipe = write_recipe(tmp_path, mini_flux)
    settings = ("train.steps=6", "checkpoint.every=2", f"output.log_every={log_every}")
    with pytest.raises(NonFiniteError, match=rf"step {max(3, log_every)}: the loss is nan") as stopped:
        run_here(recipe, *settings)
    assert stopped.value.exit_code == 8
    monkeypatch.undo()
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.position.step == 2
    run_here(recipe, *settings, resume=True)


SKIP = (
    "train.steps=6",
    "train.on_nonfinite={name: skip, in_a_row: 2}",
    "lr_schedule={name: cosine, warmup_steps: 2}",
    "checkpoint.every=1",
    "checkpoint.keep=10",
    "sample.prompts=[]",
    "output.export_base=false",
    "output.formats=[diffusers]",
)


def wrong_at(monkeypatch, *steps, value=math.nan, gradient=False):
    """Makes the last micro-batch of these steps, counted from 1, wrong: its loss, or only its gradient."""
    loss = DiffusionModule.loss

    def wrong(module, batch):
        found = loss(module, batch)
        if module.step + 1 not in steps or not module.losses:
            return found
        if gradient:
            # sqrt has the value 0 here, and its gradient is infinite.
            return found + sum((p.sum() * 0).sqrt() for p in trained_parameters(module.denoiser).values())
        return found + value

    monkeypatch.setattr(DiffusionModule, "loss", wrong)


def skipped_steps(caplog):
    return [r.getMessage() for r in caplog.records if "the step is left out" in r.getMessage()]


def state(run, step):
    """Returns the trained weights, the average and the optimizer's tensors in a checkpoint."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    return {file.name: load_file(file) for file in folder.glob("*.safetensors")}


def same(one, other):
    return one.keys() == other.keys() and all(
        one[file].keys() == other[file].keys()
        and all(one[file][name].equal(other[file][name]) for name in one[file])
        for file in one
    )


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_a_step_is_skipped(tmp_path, mini_flux, monkeypatch, caplog, kind):
    recipe = write_recipe(tmp_path, mini_flux)
    whole = run_here(recipe, *SKIP, "ema.decay=0.9", f"output.dir={tmp_path / 'whole'}")
    wrong_at(monkeypatch, 3, value=math.inf if kind == "inf" else math.nan, gradient=kind == "gradient")
    run = run_here(recipe, *SKIP, "ema.decay=0.9")
    (line,) = skipped_steps(caplog)
    assert line.startswith(f"step 3: the loss is {kind}") != (kind == "gradient")
    assert line.endswith("(1 in a row, 1 in this run)")
    rows, usual = read_metrics(run / "metrics.csv"), read_metrics(whole / "metrics.csv")
    assert [row.skipped_steps for row in rows] == [0, 0, 1, 1, 1, 1]
    assert [math.isfinite(row.loss) for row in rows] == [
        kind == "gradient" or step != 3 for step in range(1, 7)
    ]
    # The step counts for the schedule and the order of the samples.
    assert [row.lr for row in rows] == [row.lr for row in usual]
    assert [row.loss for row in rows[:2]] == [row.loss for row in usual[:2]]
    assert rows[3].loss != usual[3].loss
    assert same(state(run, 3), state(run, 2))
    assert not same(state(run, 4), state(run, 3))
    assert checkpoint.newest(run / "checkpoints").skipped_steps == {"in_a_row": 0, "total": 1}


def test_too_many_steps_in_a_row_end_the_run(tmp_path, mini_flux, monkeypatch, caplog):
    wrong_at(monkeypatch, 1, 3, 4, 5)
    with pytest.raises(NonFiniteError, match=r"step 5: .* after 2 steps in a row") as stopped:
        run_here(write_recipe(tmp_path, mini_flux), *SKIP)
    assert stopped.value.exit_code == 8
    assert len(skipped_steps(caplog)) == 3
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").position.step == 4


def test_a_resumed_run_leaves_the_same_steps_out(tmp_path, mini_flux, monkeypatch, caplog):
    recipe = write_recipe(tmp_path, mini_flux)
    constant = (*SKIP, "lr_schedule={name: constant}", "output.log_every=4")
    wrong_at(monkeypatch, 1, 3, 5)
    whole = run_here(recipe, *constant, f"output.dir={tmp_path / 'whole'}")
    expected = skipped_steps(caplog)
    assert len(expected) == 3
    caplog.clear()
    for last in (1, 3, 6):  # each stop but the last is right after a step that was left out
        run = run_here(recipe, *constant, f"train.steps={last}", resume=last > 1)
    assert skipped_steps(caplog) == expected
    assert results(run)[2] == results(whole)[2]
    assert same(state(run, 6), state(whole, 6))
    assert read_metrics(run / "metrics.csv")[-1].skipped_steps == 3


def test_steps_in_a_row_are_counted_across_a_resume(tmp_path, mini_flux, monkeypatch):
    recipe = write_recipe(tmp_path, mini_flux)
    wrong_at(monkeypatch, 2, 3, 4)
    run_here(recipe, *SKIP, "train.steps=3")
    with pytest.raises(NonFiniteError, match=r"step 4: .* after 2 steps in a row"):
        run_here(recipe, *SKIP, resume=True)
    # The advice of a run that stopped: the choice may change.
    run_here(recipe, *SKIP, "train.on_nonfinite={name: skip, in_a_row: 3}", resume=True)


NAN_IN_THE_SECOND_PROCESS = """
import math
from halfbyte.trainer.runtime.world import read_world
from halfbyte.trainer.training.module import DiffusionModule
real = DiffusionModule.loss
wrong = read_world().rank == 1
# The gradient stays finite.
DiffusionModule.loss = lambda module, batch: real(module, batch) + (math.nan if wrong and module.step == 1 else 0.0)
"""


def test_all_processes_leave_out_the_same_steps(server, tmp_path, mini_flux):
    recipe = write_recipe(tmp_path, mini_flux)
    settings = (*SKIP, "train.steps=3", "train.grad_accumulation=1")
    processes = server.start_ranks(2, "train", str(recipe), *settings, before=NAN_IN_THE_SECOND_PROCESS)
    for process in processes:
        assert process.wait() == 0, process.errors
    run = tmp_path / "run"
    assert [row.skipped_steps for row in read_metrics(run / "metrics.csv")] == [0, 1, 1]
    assert same(state(run, 2), state(run, 1))
    assert not same(state(run, 3), state(run, 2))
    lines = [line for process in processes for line in process.errors.splitlines() if "left out" in line]
    assert len(lines) == 1
    assert "those of another process" in lines[0]


@pytest.mark.gpu
def test_recorded_steps_can_be_left_out(tmp_path, mini_flux, monkeypatch, caplog):
    recipe = write_recipe(tmp_path, mini_flux)
    gpu = (*SKIP, "quant.compute_dtype=bfloat16", "train.attention=deterministic", "train.cuda_graphs=true")
    wrong_at(monkeypatch, 3)
    run = run_here(recipe, *gpu, world=read_world({}))
    assert len(skipped_steps(caplog)) == 1
    assert [math.isfinite(row.loss) for row in read_metrics(run / "metrics.csv")] == [
        True,
        True,
        False,
        *3 * [True],
    ]
    assert same(state(run, 3), state(run, 2))
    assert not same(state(run, 4), state(run, 3))
    assert torch.cuda.is_available()
