"""Tests losses that are NaN: the run stops with its own exit code, also between the rows of its metrics."""

import math

import pytest

from halfbyte.trainer.errors import NonFiniteError
from halfbyte.trainer.run_folder import checkpoint
from halfbyte.trainer.training.module import DiffusionModule

from runs import run_here, write_recipe


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
