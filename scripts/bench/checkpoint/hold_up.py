"""Measures how long saving a checkpoint holds up training, with an adapter and optimizer state of full size.

    python -m scripts.bench.checkpoint.hold_up [--rank 16] [--saves 5] [--folder FOLDER]

The adapter is that of FLUX.1-dev, with AdamW; there is no base, because a checkpoint has none. It runs on the GPU if
there is one. For each save it prints the milliseconds until the training thread goes on, and its processor time; the
longest time after that for which the writer keeps a thread that needs Python's lock from running; the time until the
device has made the copy (0 on the CPU); and the seconds until the checkpoint is complete on the disk.
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from halfbyte.trainer.adapters.lora import trained_parameters
from halfbyte.trainer.optim.averages import TrainedWeights
from halfbyte.trainer.plan.dry_run import DryRun
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.background import Background
from halfbyte.trainer.runtime.world import World
from halfbyte.trainer.training.checkpointer import Checkpointer
from halfbyte.trainer.training.metrics import METRICS
from scripts.bench.models import family_of

_EVERY = 10


def measure(rank: int, saves: int, folder: Path, device: torch.device) -> None:
    """Prints the measurements."""
    module, optimizer = _state(rank, device)
    (folder / METRICS).touch()
    nbytes = sum(p.nbytes for p in trained_parameters(module.denoiser).values())
    print(
        f"adapter of rank {rank}: {nbytes / 1e6:.0f} MB, with AdamW's moments {3 * nbytes / 1e6:.0f} MB, on {device}"
    )
    trainer: Any = SimpleNamespace(
        optimizers=[optimizer],
        accumulate_grad_batches=1,
        precision_plugin=SimpleNamespace(state_dict=dict),
        should_stop=False,
    )
    with Background() as background:
        saver = Checkpointer(
            World(1, 0, 1, 0, device),
            folder / "checkpoints",
            background,
            every=_EVERY,
            keep=1,
            last_step=10**9,
            global_batch=1,
            resume=None,
        )
        for number in range(saves):
            for step in range(1, _EVERY):  # the first of these makes room for the copies
                module.step = number * _EVERY + step
                saver.on_step_end(trainer, module)
                time.sleep(0.1)
            background.wait()
            module.step = (number + 1) * _EVERY
            _synchronize(device)
            began, computed = time.perf_counter(), time.thread_time()
            saver.on_step_end(trainer, module)
            held, computed = time.perf_counter() - began, time.thread_time() - computed
            _synchronize(device)
            copied = time.perf_counter() - began - held
            longest = _longest_pause(background)
            written = time.perf_counter() - began
            print(
                f"save {number + 1}: {1e3 * held:.0f} ms until training goes on ({1e3 * computed:.0f} ms of processor"
                f" time), then pauses of at most"
                f" {1e3 * longest:.0f} ms, the device's copy {1e3 * copied:.0f} ms; on the disk after {written:.1f} s",
                flush=True,
            )


def _state(rank: int, device: torch.device) -> tuple[Any, torch.optim.Optimizer]:
    """Returns a stand-in for the training module, and its optimizer after one step."""
    family = family_of("flux")
    recipe = Recipe.model_validate(
        {
            "model": {"family": "flux", "path": str(family.source.folder)},
            "lora": {"rank": rank, "alpha": rank},
            "data": {"path": "."},
            "output": {"dir": "run"},
        }
    )
    denoiser = cast(nn.Module, DryRun(recipe, family).denoiser)
    for name, parameter in trained_parameters(denoiser).items():
        owner, _, field = name.rpartition(".")
        value = torch.full(parameter.shape, 0.01, device=device)
        setattr(denoiser.get_submodule(owner), field, nn.Parameter(value))
    parameters = trained_parameters(denoiser)
    optimizer = recipe.optimizer.build(list(parameters.items()))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    module = SimpleNamespace(
        denoiser=denoiser, family=family, weights=TrainedWeights(), skipped_steps=None, step=0
    )
    return module, optimizer


def _longest_pause(background: Background) -> float:
    """Returns the longest time, in seconds, for which this thread did not run until the save is complete."""
    waiting = threading.Thread(target=background.wait)
    waiting.start()
    longest, last = 0.0, time.perf_counter()
    while waiting.is_alive():
        time.sleep(0.001)  # without it, this thread would hold Python's lock all the time
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as work:
        here = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        measure(given.rank, given.saves, Path(work), here)
