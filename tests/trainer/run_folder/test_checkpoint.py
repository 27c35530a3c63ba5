"""Checkpoints are complete or absent, and restore bitwise identical state."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.trainer.adapters.saved import ADAPTER_FILE
from halfbyte.trainer.run_folder import checkpoint


def trained(steps=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        f"layer{i}.lora_A.weight": torch.nn.Parameter(torch.randn(4, 3, generator=generator))
        for i in range(2)
    }
    optimizer = torch.optim.AdamW(parameters.items(), lr=0.1)
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.randn(4, 3, generator=generator)
        optimizer.step()
    return parameters, optimizer


def save(root, step, steps=3):
    parameters, optimizer = trained(steps)
    state = {f"transformer.{name}": p.detach() for name, p in parameters.items()}
    return checkpoint.write_checkpoint(
        root,
        checkpoint.snapshot(
            checkpoint.Position(step, step * 2, 4),
            write_adapter=lambda folder: save_file(state, f"{folder}/{ADAPTER_FILE}"),
            optimizer=checkpoint.named_optimizer_state(optimizer),
            scaler={"scale": 65536.0},
        ),
    )


def test_a_checkpoint_restores_bitwise_identical_state(tmp_path):
    save(tmp_path, 3)
    parameters, optimizer = trained()
    saved = checkpoint.newest(tmp_path)
    assert saved.position == checkpoint.Position(3, 6, 4)
    assert saved.scaler == {"scale": 65536.0}
    assert all(torch.equal(saved.adapter[name], p) for name, p in parameters.items())
    _, fresh = trained(steps=0)
    checkpoint.restore_optimizer(fresh, saved.optimizer)
    for one, other in zip(
        optimizer.state_dict()["state"].values(), fresh.state_dict()["state"].values(), strict=True
    ):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", [ADAPTER_FILE, "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, caplog, name, damage):
    save(tmp_path, 3)
    newer = save(tmp_path, 4)
    file = newer / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert checkpoint.newest(tmp_path).position.step == 3
    assert str(newer) in caplog.text


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_file_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = save(tmp_path, 3)
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert len(modes) == 4
    assert set(modes.values()) == {0o666 & ~umask}


def test_a_crash_before_the_rename_leaves_the_older_checkpoint(tmp_path):
    save(tmp_path, 3)

    def write_and_die(folder):
        raise OSError("no space left on device")

    _, optimizer = trained()
    with pytest.raises(OSError, match="no space"):
        checkpoint.write_checkpoint(
            tmp_path,
            checkpoint.snapshot(
                checkpoint.Position(4, 8, 4),
                write_adapter=write_and_die,
                optimizer=checkpoint.named_optimizer_state(optimizer),
                scaler={},
            ),
        )
    assert [folder.name for folder in checkpoint.folders(tmp_path)] == ["step-000003"]
    assert checkpoint.newest(tmp_path).position.step == 3


def test_all_files_are_synced_before_the_rename(tmp_path, monkeypatch):
    synced, events = os.fsync, []
    renamed = os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.fstat(fd).st_ino) or synced(fd))
    monkeypatch.setattr(os, "rename", lambda path, target: events.append("named") or renamed(path, target))
    folder = save(tmp_path, 3)
    named = events.index("named")
    assert {folder.stat().st_ino, *(file.stat().st_ino for file in folder.iterdir())} <= {*events[:named]}
    assert tmp_path.stat().st_ino in events[named:]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 3)
    save(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003"]


def test_pruning_keeps_the_newest(tmp_path):
    for step in (5, 100, 20):
        save(tmp_path, step, steps=1)
    checkpoint.prune(tmp_path, 2)
    assert [folder.name for folder in checkpoint.folders(tmp_path)] == ["step-000020", "step-000100"]


def test_another_models_optimizer_is_refused(tmp_path):
    save(tmp_path, 3)
    parameters, _ = trained()
    optimizer = torch.optim.AdamW(zip(("x", "y"), parameters.values(), strict=True))
    with pytest.raises(ValueError, match="parameters"):
        checkpoint.restore_optimizer(optimizer, checkpoint.newest(tmp_path).optimizer)


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    folder = save(tmp_path, 3)
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors"}
    json.loads((folder / "state.json").read_text())
