"""Tests checkpoints that are written while training goes on: complete, one at a time, and no error is lost."""

import errno
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.quant.files.digest import sha256_file
from halfbyte.trainer.run_folder import checkpoint
from halfbyte.trainer.runtime.background import THREAD_NAME, Background
from halfbyte.trainer.runtime.host_memory import HostCopies, size_of
from halfbyte.trainer.runtime.signals import SIGNALS, Stopped
from halfbyte.trainer.training import checkpointer
from halfbyte.trainer.training.module import DiffusionModule

from runs import run_here, write_recipe

SETTINGS = ("train.steps=4", "checkpoint.every=1", "checkpoint.keep=10", "sample.prompts=[]", "ema.decay=0.9")
QUICK = ("output.export_base=false", "output.formats=[diffusers]")
Write = Callable[..., Path]


@pytest.fixture
def steps_done(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the list to which each step adds its number, counted from 0, when it begins."""
    begun: list[int] = []
    loss = DiffusionModule.loss
    monkeypatch.setattr(
        DiffusionModule, "loss", lambda module, batch: (begun.append(module.step), loss(module, batch))[1]
    )
    return begun


def written_by(
    monkeypatch: pytest.MonkeyPatch, write: Callable[[Write, Path, checkpoint.Snapshot], Path]
) -> None:
    """Calls `write` with the real writer and its arguments in place of the real writer."""
    real = checkpoint.write_checkpoint
    monkeypatch.setattr(checkpoint, "write_checkpoint", lambda root, snapshot: write(real, root, snapshot))


def until(holds: Callable[[], bool]) -> None:
    for _ in range(6000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("waited for a minute")


def content(folder: Path) -> dict[str, object]:
    """Returns all that a checkpoint has, apart from the order of safetensors' headers, which is random."""
    found: dict[str, object] = {"state": json.loads((folder / "state.json").read_text())}
    digests = json.loads((folder / "manifest.json").read_text())
    assert digests == {
        file.name: sha256_file(file) for file in folder.iterdir() if file.name != "manifest.json"
    }
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        found[file.name] = (json.loads(raw[8:end]), raw[end:])
    return found


def test_a_checkpoint_is_that_of_its_step_even_if_it_is_written_later(
    mini_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_done: list[int]
) -> None:
    late: list[str] = []

    def write_late(real: Write, root: Path, snapshot: checkpoint.Snapshot) -> Path:
        late.append(threading.current_thread().name)
        step = snapshot.position.step
        # The next step's update is done when the step after it begins to wait for this save: give it time.
        if step < 4:
            until(lambda: steps_done.count(step) == 2)
            time.sleep(0.3)
        return real(root, snapshot)

    recipe = write_recipe(tmp_path, mini_flux)
    written_by(monkeypatch, write_late)
    background = run_here(recipe, *SETTINGS, *QUICK)
    monkeypatch.undo()
    start = Background.start
    monkeypatch.setattr(Background, "start", lambda saves, work: (start(saves, work), saves.wait()))
    foreground = run_here(write_recipe(tmp_path, mini_flux, name="foreground"), *SETTINGS, *QUICK)
    assert late == [THREAD_NAME] * 4
    contents = []
    for step in (1, 2, 3, 4):
        one, other = (content(run / "checkpoints" / f"step-{step:06d}") for run in (background, foreground))
        assert one == other
        assert checkpoint.TRAINED_FILE in one
        contents.append(one)
    assert contents[0] != contents[1]


def test_a_checkpoint_counts_when_it_is_complete(
    mini_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps_done: list[int]
) -> None:
    listed: list[list[str]] = []

    def names(root: Path) -> list[str]:
        return [folder.name for folder in checkpoint.folders(root)]

    def write(real: Write, root: Path, snapshot: checkpoint.Snapshot) -> Path:
        until(lambda: snapshot.position.step == 4 or steps_done.count(snapshot.position.step) == 2)
        listed.append(names(root))
        written = real(root, snapshot)
        listed.append(names(root))
        return written

    written_by(monkeypatch, write)
    run = run_here(write_recipe(tmp_path, mini_flux), *SETTINGS, *QUICK, "checkpoint.keep=1")
    one, two, three, four = (f"step-00000{step}" for step in (1, 2, 3, 4))
    assert listed == [[], [one], [one], [one, two], [two], [two, three], [three], [three, four]]
    assert names(run / "checkpoints") == [four]


def full(*_: object) -> Path:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a checkpoint")


def fail_at(wrong: int) -> Callable[[Write, Path, checkpoint.Snapshot], Path]:
    return lambda real, root, snapshot: full() if snapshot.position.step == wrong else real(root, snapshot)


@pytest.mark.parametrize(("wrong", "last"), [(2, 3), (4, 4)], ids=["in between", "after the last step"])
def test_an_error_of_the_writer_ends_the_run_once(
    mini_flux: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wrong: int,
    last: int,
) -> None:
    written_by(monkeypatch, fail_at(wrong))
    steps: list[int] = []
    save = checkpointer.Checkpointer.on_step_end
    monkeypatch.setattr(
        checkpointer.Checkpointer,
        "on_step_end",
        lambda callback, trainer, module: (steps.append(module.step), save(callback, trainer, module))[1],
    )
    recipe = write_recipe(tmp_path, mini_flux)
    with pytest.raises(OSError, match="No space left"):
        run_here(recipe, *SETTINGS, *QUICK)
    assert steps[-1] == last
    assert "could not be saved" not in caplog.text
    run = tmp_path / "run"
    assert not (run / "adapter").exists()
    saved = checkpoint.newest(run / "checkpoints")
    assert saved is not None
    assert saved.position.step == wrong - 1
    assert not [left for left in (run / "checkpoints").iterdir() if left.name.startswith(".")]


def test_an_error_of_the_writer_is_logged_if_another_error_ends_the_run(
    mini_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loss, failing = DiffusionModule.loss, threading.Event()

    def fail_late(real: Write, root: Path, snapshot: checkpoint.Snapshot) -> Path:
        assert failing.wait(60)
        time.sleep(0.2)
        return full()

    def fail(module: DiffusionModule, batch: object) -> torch.Tensor:
        if module.step == 1:
            failing.set()
            raise ValueError("the step's own error")
        return loss(module, batch)  # type: ignore[arg-type]

    written_by(monkeypatch, fail_late)
    monkeypatch.setattr(DiffusionModule, "loss", fail)
    with pytest.raises(ValueError, match="the step's own error"), caplog.at_level(logging.ERROR):
        run_here(write_recipe(tmp_path, mini_flux), *SETTINGS, *QUICK)
    assert [record.getMessage().count("No space left") for record in caplog.records] == [1]


def test_a_signal_waits_for_the_writer(caplog: pytest.LogCaptureFixture) -> None:
    """As in a run: the lock of its folder is released afterwards."""
    done: list[str] = []

    def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        done.append("written")
        full()

    def save() -> None:
        with Background() as saves:
            saves.start(work)
            saves.wait()

    with SIGNALS.installed(), pytest.raises(Stopped):
        save()
    assert done == ["written"]
    assert "could not be saved: a checkpoint: No space left" in caplog.text


def test_a_second_piece_of_work_waits_for_the_first() -> None:
    order: list[str] = []
    with Background() as saves:
        saves.start(lambda: (time.sleep(0.2), order.append("first")))
        order.append("goes on")
        saves.start(lambda: order.append("second"))
    assert order == ["goes on", "first", "second"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_copies_keep_their_values_and_their_memory(device: str) -> None:
    host = HostCopies(torch.device(device))
    places = []
    for value in (1.0, 2.0):
        tensors = {
            "matrix": torch.full((300, 7), value, device=device),
            "bytes": torch.full((5,), int(value), dtype=torch.uint8, device=device),
            "scalar": torch.tensor(value),
            "none": torch.empty(0, 4, device=device),
            "half": torch.full((9,), value, device=device).bfloat16().t(),
        }
        host.reserve(size_of(tensors))
        copies = host.copies(tensors)
        mark = host.mark()
        expected = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        for tensor in tensors.values():
            tensor.zero_()
        if mark is not None:
            mark.synchronize()
        assert all(copies[name].equal(tensor) for name, tensor in expected.items())
        assert all(copies[name].dtype == tensor.dtype for name, tensor in expected.items())
        places.append(copies["matrix"].data_ptr())
    assert places[0] == places[1]


def test_loading_needs_no_knowledge_of_the_writer(mini_flux: Path, tmp_path: Path) -> None:
    run = run_here(write_recipe(tmp_path, mini_flux), *SETTINGS, *QUICK)
    saved = checkpoint.newest(run / "checkpoints")
    assert saved is not None
    exported = load_file(run / "adapter" / "pytorch_lora_weights.safetensors")
    assert saved.average is not None
    assert {f"transformer.{name}" for name in saved.average} == exported.keys()
    assert all(exported[f"transformer.{name}"].equal(tensor) for name, tensor in saved.average.items())
