"""The model stays on its device when training ends, for the last sample images and the export."""

import pytest
import torch
from rich.console import Console

from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.run import run
from halfbyte.trainer.runtime.world import read_world
from halfbyte.trainer.training import loop
from halfbyte.trainer.training.module import DiffusionModule

from runs import run_here, write_recipe


def test_lightning_does_not_move_the_model_when_training_ends(mini_flux, tmp_path, monkeypatch):
    called = []
    stay = DiffusionModule.cpu

    def noted(module):
        # Meta tensors cannot be moved, so nn.Module.cpu would raise.
        device = next(module.denoiser.to("meta").parameters()).device
        called.append((device, next(stay(module).denoiser.parameters()).device))
        raise KeyboardInterrupt

    monkeypatch.setattr(DiffusionModule, "cpu", noted)
    recipe = write_recipe(tmp_path, mini_flux)
    with pytest.raises(KeyboardInterrupt):
        run_here(recipe, "train.steps=1", "sample.prompts=[]")
    assert called[0] == (torch.device("meta"), torch.device("meta"))


@pytest.mark.gpu
def test_a_run_on_the_gpu_ends_with_samples_and_the_base_there(mini_flux, tmp_path, monkeypatch):
    devices = []
    train = loop.train

    def noted(training):
        finished = train(training)
        devices.extend({parameter.device.type for parameter in training.denoiser.parameters()})
        return finished

    monkeypatch.setattr("halfbyte.trainer.run.train", noted)
    recipe = load_recipe(write_recipe(tmp_path, mini_flux), ["quant.compute_dtype=bfloat16"])
    assert run(recipe, read_world({}), console=Console(quiet=True), resume=False)
    assert devices == ["cuda"]
    assert len(list((recipe.output.dir / "samples").glob("step-*.png"))) == 2
