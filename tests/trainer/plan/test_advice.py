"""The advice when a run is out of memory: the stage, the planned memory, and the cheapest changes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.trainer.errors import OutOfMemory
from halfbyte.trainer.plan import advice as full_device
from halfbyte.trainer.plan.fit import open_planner
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.training.module import DiffusionModule

from runs import run_here, write_recipe

FULL = torch.OutOfMemoryError("full")


@pytest.fixture
def toy(tmp_path: Path, mini_flux: Any) -> Path:
    return write_recipe(tmp_path, mini_flux)


def test_out_of_memory_names_the_cheapest_changes_and_keeps_the_checkpoint(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = DiffusionModule.training_step

    def full_at_the_third(self: DiffusionModule, batch: Any, number: int) -> Any:
        if self.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, batch, number)

    monkeypatch.setattr(DiffusionModule, "training_step", full_at_the_third)
    with pytest.raises(OutOfMemory) as caught:
        run_here(toy, "train.gradient_checkpointing=none", "train.grad_accumulation=1", "sample.prompts=[]")
    assert caught.value.exit_code == 6
    message = str(caught.value)
    assert "last checkpoint" in message
    assert "optimizer.name=adamw_8bit" in message
    assert "train.gradient_checkpointing=selective" in message
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


def test_the_message_says_that_no_setting_is_left_to_change(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full_device, "cheapest_savings", lambda planner, phase: [])
    recipe: Recipe = load_recipe(toy)
    message = full_device.out_of_memory(recipe, open_planner(recipe).family, "in training", "step")
    assert "a larger card" in message


@pytest.mark.parametrize(
    ("place", "phase", "change", "error"),
    [
        (
            "families.encoders.PipelineEncoders.encode_texts",
            "encoding .*'encode (texts|pictures)'",
            "model.text_encoder_quant=int8",
            FULL,
        ),
        (
            "families.encoders.PipelineEncoders.encode_images",
            "encoding .*'encode (texts|pictures)'",
            "",
            RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
        ),
        ("run.load_denoiser", "loading .*'load and quantize'", "", FULL),
        ("run.export_trained", "last step.*'(export|sample)'", "", FULL),
    ],
)
def test_out_of_memory_at_any_stage_names_the_stage_and_its_phase(
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    phase: str,
    change: str,
    error: Exception,
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(f"halfbyte.trainer.{place}", full)
    with pytest.raises(OutOfMemory, match=phase) as caught:
        run_here(toy, "model.text_encoder_quant=none", f"data.cache_dir={tmp_path / 'cache'}")
    assert caught.value.exit_code == 6
    assert change in str(caught.value)
