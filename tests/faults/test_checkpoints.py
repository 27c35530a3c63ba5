"""Tests that a damaged checkpoint is never used, counted, deleted or in the way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte.quant.files.digest import sha256_file
from halfbyte.trainer.adapters.saved import ADAPTER_FILE
from halfbyte.trainer.errors import DiskError, RecipeError
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.run_folder import checkpoint, checkpoint_folders
from halfbyte.trainer.run_folder.checkpoint_folders import copy_adapter, recover_checkpoints
from halfbyte.trainer.run_folder.folder import RunFolder, begin, claim

from runs import write_recipe
from small_checkpoint import save


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def steps(root: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in checkpoint.folders(root)]


def forget() -> None:
    """Forgets what was verified, as a new process has."""
    checkpoint_folders._verified.clear()
    checkpoint_folders._named.clear()


def test_pruning_counts_sound_checkpoints_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    for step in (6, 8):
        flip(tmp_path / f"step-{step:06d}" / "optimizer.safetensors")
    forget()
    checkpoint.prune(tmp_path, 1)
    assert steps(tmp_path) == [4, 6, 8]
    save(tmp_path, 10)
    checkpoint.prune(tmp_path, 1)
    assert steps(tmp_path) == [6, 8, 10]
    assert checkpoint.newest(tmp_path).position.step == 10  # type: ignore[union-attr]
    for step in (6, 8):
        named = [r for r in caplog.records if f"step-{step:06d}" in r.getMessage()]
        assert len(named) == 1


def test_a_checkpoint_is_read_again_only_if_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    digest = checkpoint_folders.sha256_file
    monkeypatch.setattr(
        checkpoint_folders, "sha256_file", lambda file: read.append(file.name) or digest(file)
    )
    for step in (2, 4, 6):
        save(tmp_path, step)
        checkpoint.prune(tmp_path, 2)
    assert read == []
    forget()
    checkpoint.newest(tmp_path)
    assert len(read) == 3
    checkpoint.newest(tmp_path)
    assert len(read) == 3
    flip(tmp_path / "step-000006" / "state.json")
    assert checkpoint.newest(tmp_path).position.step == 4  # type: ignore[union-attr]


def test_with_damaged_checkpoints_only_a_resume_is_refused(tmp_path: Path, mini_flux: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, mini_flux))
    run = RunFolder(recipe.output.dir)
    begin(run, recipe)
    for step in (2, 4):
        flip(save(run.checkpoints, step) / "state.json")
    before = sorted(run.root.rglob("*"))
    with pytest.raises(RecipeError) as caught:
        claim(run, recipe, resume=True)
    assert f"move {run.checkpoints} to another place" in str(caught.value)
    for step in (2, 4):
        assert f"step-{step:06d}: state.json does not match its checksum" in str(caught.value)
    assert sorted(run.root.rglob("*")) == before
    run.checkpoints.rename(tmp_path / "elsewhere")  # the advice
    claim(run, recipe, resume=True)


@pytest.mark.parametrize("manifest", ["{}", "[]", "", '"a"', '{"../x": 1}', "[" * 10**5])
def test_an_incomplete_manifest_is_not_believed(tmp_path: Path, manifest: str) -> None:
    save(tmp_path, 2)
    (save(tmp_path, 4) / "manifest.json").write_text(manifest)
    assert checkpoint.newest(tmp_path).position.step == 2  # type: ignore[union-attr]
    copies = tmp_path / "copies"
    copies.mkdir()
    assert copy_adapter(tmp_path, None, copies) == "step-000002"
    with pytest.raises(RecipeError, match="step-000004 is damaged"):
        copy_adapter(tmp_path, 4, copies)


@pytest.mark.parametrize(
    "name", [ADAPTER_FILE, "optimizer.safetensors", "state.json", checkpoint.TRAINED_FILE]
)
def test_a_manifest_must_list_every_file_of_a_checkpoint(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 4)
    manifest = folder / "manifest.json"
    shutil.copyfile(folder / ADAPTER_FILE, folder / checkpoint.TRAINED_FILE)
    listed = {file.name: sha256_file(file) for file in folder.iterdir() if file != manifest}
    manifest.write_text(json.dumps(listed))
    assert checkpoint.newest(tmp_path) is not None
    del listed[name]
    manifest.write_text(json.dumps(listed))
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("left", [".step-000004.old", ".step-000004.halfbyte.old"])
@pytest.mark.parametrize("now", ["damaged", "missing", "sound"])
def test_a_checkpoint_that_was_being_replaced_is_recovered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, left: str, now: str
) -> None:
    save(tmp_path, 2)
    folder = save(tmp_path, 4)
    content = (folder / "state.json").read_bytes()
    shutil.copytree(folder, tmp_path / left)
    if now == "damaged":
        flip(folder / "state.json")
    elif now == "missing":
        shutil.rmtree(folder)
    copies = tmp_path.with_name("copies")
    copies.mkdir(exist_ok=True)
    # Readers use it where it is: they may change nothing.
    assert checkpoint.newest(tmp_path).position.step == 4  # type: ignore[union-attr]
    assert copy_adapter(tmp_path, None, copies) == copy_adapter(tmp_path, 4, copies) == "step-000004"
    assert (tmp_path / left).exists()
    recover_checkpoints(tmp_path)
    assert (folder / "state.json").read_bytes() == content
    names = {"step-000002", "step-000004", *(["step-000004.damaged-1"] if now == "damaged" else [])}
    assert {entry.name for entry in tmp_path.iterdir()} == names
    assert checkpoint.newest(tmp_path).folder == folder  # type: ignore[union-attr]


def test_an_interrupted_deletion_is_completed(tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    folder.rename(tmp_path / ".step-000002.halfbyte.tmp")
    save(tmp_path, 4).rename(tmp_path / ".step-000004.tmp")  # the name until version 0.2
    save(tmp_path, 6)
    recover_checkpoints(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000006"]


def group(facts: dict[str, Any]) -> dict[str, Any]:
    return facts["param_groups"][0]  # type: ignore[no-any-return]


OTHER_STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda facts: [facts],
    "no position": lambda facts: facts.pop("position"),
    "a step in words": lambda facts: facts["position"].update(step="four"),
    "another step": lambda facts: facts["position"].update(step=3),
    "a fraction of a step": lambda facts: facts["position"].update(step=4.0),
    "no samples": lambda facts: facts["position"].update(global_batch=0),
    "no samples at a resolution": lambda facts: facts["position"].update(global_batch={"512": 0}),
    "samples at no resolution": lambda facts: facts["position"].update(global_batch={}),
    "samples at an unknown resolution": lambda facts: facts["position"].update(global_batch={"x": 1}),
    "an unknown unit": lambda facts: facts["position"].update(epochs=1),
    "no groups": lambda facts: facts.pop("param_groups"),
    "a group without parameters": lambda facts: group(facts).pop("params"),
    "numbered parameters": lambda facts: group(facts).update(params=[0]),
    "NaN": lambda facts: group(facts).update(lr=float("nan")),
    "scalars in a list": lambda facts: facts.update(optimizer_scalars=[]),
    "a scaler in words": lambda facts: facts.update(scaler="none"),
}


@pytest.mark.parametrize("what", OTHER_STATES)
def test_a_state_of_another_version_is_one_message(tmp_path: Path, what: str) -> None:
    folder = save(tmp_path, 4)
    state, manifest = folder / "state.json", folder / "manifest.json"
    facts = json.loads(state.read_text())
    changed = OTHER_STATES[what](facts)
    state.write_text(json.dumps(changed if what == "a list" else facts))
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), state.name: sha256_file(state)}))
    with pytest.raises(RecipeError) as caught:
        checkpoint.newest(tmp_path)
    assert str(state) in str(caught.value)
    assert f"lora.init_from={folder / ADAPTER_FILE}" in str(caught.value)


def test_infinity_is_a_setting(tmp_path: Path) -> None:
    """Prodigy's growth_rate is infinite by default."""
    folder = save(tmp_path, 4)
    state, manifest = folder / "state.json", folder / "manifest.json"
    facts = json.loads(state.read_text())
    group(facts).update(growth_rate=float("inf"))
    state.write_text(json.dumps(facts))
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), state.name: sha256_file(state)}))
    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    assert saved.optimizer["param_groups"][0]["growth_rate"] == float("inf")


def test_a_full_temporary_folder_is_no_damage(tmp_path: Path) -> None:
    save(tmp_path, 4)
    with pytest.raises(DiskError, match="TMPDIR"):
        copy_adapter(tmp_path, None, tmp_path / "absent")
