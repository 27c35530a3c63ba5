"""The settings that a resumed run may change, and the messages about them."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.trainer.errors import OutOfMemory, RecipeError
from halfbyte.trainer.export.export import ADAPTER_FILE
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.run_folder.folder import EXECUTION_SETTINGS, RunFolder, claim

from runs import run_here, write_recipe

QUICK = ("output.export_base=false", "sample.prompts=[]")


def weights(run: Path) -> dict[str, list[float]]:
    return {
        name: tensor.flatten().tolist() for name, tensor in load_file(run / "adapter" / ADAPTER_FILE).items()
    }


def test_a_run_resumes_with_settings_that_only_change_rounding(
    mini_flux: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The situation after running out of memory: half of the steps with each group of settings."""
    recipe = write_recipe(tmp_path, mini_flux)
    whole = weights(run_here(recipe, *QUICK, f"output.dir={tmp_path / 'whole'}"))
    run_here(recipe, *QUICK, "train.steps=2")
    assert "--resume" not in caplog.text
    changed = (
        "train.gradient_checkpointing=offload",
        "train.stream_blocks=true",
        "train.fused_adapters=false",
    )
    run = run_here(recipe, *QUICK, *changed, resume=True)
    (line,) = [record.getMessage() for record in caplog.records if "--resume" in record.getMessage()]
    assert "rounding" in line
    for setting in ("gradient_checkpointing: 'full' -> 'offload'", "stream_blocks: false -> true"):
        assert setting in line
    for name, found in weights(run).items():
        assert found == pytest.approx(whole[name], abs=1e-4), name


@pytest.mark.parametrize(
    "change", ["optimizer.name=adamw_8bit", "train.batch_size=2", "lora.rank=2", "train.seed=6"]
)
def test_settings_that_change_the_results_are_refused(mini_flux: Path, tmp_path: Path, change: str) -> None:
    recipe = write_recipe(tmp_path, mini_flux)
    run_here(recipe, *QUICK, "train.steps=2")
    with pytest.raises(RecipeError, match="--resume: ") as caught:
        run_here(recipe, *QUICK, change, "train.gradient_checkpointing=selective", resume=True)
    assert change.split("=")[0] in str(caught.value)
    assert "gradient_checkpointing" not in str(caught.value)


def test_before_the_first_checkpoint_any_setting_may_change(mini_flux: Path, tmp_path: Path) -> None:
    """The situation after the first step ran out of memory."""
    recipe = load_recipe(write_recipe(tmp_path, mini_flux))
    folder = RunFolder(recipe.output.dir)
    folder.root.mkdir()
    folder.recipe.write_text(recipe.to_yaml())
    other = load_recipe(tmp_path / "run.yaml", ["optimizer.name=adamw_8bit", "lora.rank=2"])
    claim(folder, other, resume=True)
    with pytest.raises(RecipeError, match="no checkpoint"):
        claim(folder, other, resume=False)


def test_before_the_first_checkpoint_the_base_may_change(
    mini_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, mini_flux)
    with monkeypatch.context() as patched:
        patched.setattr("halfbyte.trainer.training.loop.Trainer.fit", full)
        with pytest.raises(OutOfMemory):
            run_here(recipe, *QUICK)
    other = tmp_path / "other"
    shutil.copytree(mini_flux, other)
    config = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(config) + "\n")
    run = run_here(recipe, *QUICK, f"model.path={other}", resume=True)
    assert (run / "adapter" / ADAPTER_FILE).is_file()
    again = tmp_path / "run.yaml"
    with pytest.raises(RecipeError, match=r"model\.path"):
        run_here(again, *QUICK, "train.steps=6", resume=True)


def full(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_changing_the_number_of_steps_warns_about_a_falling_rate(
    mini_flux: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = write_recipe(tmp_path, mini_flux)
    cosine = "lr_schedule={name: cosine}"
    run = run_here(recipe, *QUICK, cosine, "train.steps=2")
    claim(RunFolder(run), load_recipe(recipe, [cosine, *QUICK, "train.steps=2"]), resume=True)
    assert "--resume" not in caplog.text
    claim(RunFolder(run), load_recipe(recipe, [cosine, *QUICK, "train.steps=4"]), resume=True)
    (line,) = [record.getMessage() for record in caplog.records if "--resume" in record.getMessage()]
    assert re.findall(r"\d+\.?\d*", line.partition("train.steps ")[2]) == ["4", "2", "2", "0.854", "0.5"]


def test_settings_that_only_change_rounding_exist_in_the_recipe(mini_flux: Path, tmp_path: Path) -> None:
    settings = load_recipe(write_recipe(tmp_path, mini_flux)).dump()
    for name in EXECUTION_SETTINGS:
        section, field = name.split(".")
        assert field in settings[section]


def test_a_checkpoint_with_other_parameter_groups_is_refused(mini_flux: Path, tmp_path: Path) -> None:
    """In old DoRA checkpoints magnitudes were in the same group as A and B; now they have a group without
    decay."""
    recipe = write_recipe(tmp_path, mini_flux)
    dora = (*QUICK, "lora.dora=true")
    run = run_here(recipe, *dora, "train.steps=2")
    saved = run / "checkpoints" / "step-000002"
    state, manifest = (json.loads((saved / name).read_text()) for name in ("state.json", "manifest.json"))
    decayed, magnitudes = (group["params"] for group in state["param_groups"])
    state["param_groups"] = [{**state["param_groups"][0], "params": decayed + magnitudes}]
    (saved / "state.json").write_text(json.dumps(state))
    manifest["state.json"] = hashlib.sha256((saved / "state.json").read_bytes()).hexdigest()
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RecipeError) as caught:
        run_here(recipe, *dora, resume=True)
    start = f"lora.init_from={saved / ADAPTER_FILE}"
    message = str(caught.value)
    assert message.startswith(f"--resume: {saved}: ")
    assert f"1 group of {len(decayed + magnitudes)} parameters" in message
    assert f"2 groups of {len(decayed)} and {len(magnitudes)} parameters" in message
    assert message.endswith(f"{start} output.dir=runs/other")
    run_here(recipe, *dora, "train.steps=1", start, f"output.dir={tmp_path / 'other'}")
