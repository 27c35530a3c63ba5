"""Saves checkpoints while training goes on, and restores the optimizer of a resumed run."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from halfbyte.trainer.adapters.lora import (
    adapter_settings,
    adapter_tensors,
    by_parameter,
    trained_parameters,
    write_adapter,
)
from halfbyte.trainer.adapters.saved import ADAPTER_FILE
from halfbyte.trainer.errors import NonFiniteError, RecipeError
from halfbyte.trainer.recipe.batch_sizes import BatchSize
from halfbyte.trainer.run_folder import checkpoint
from halfbyte.trainer.runtime.background import Background
from halfbyte.trainer.runtime.host_memory import HostCopies, size_of
from halfbyte.trainer.runtime.world import World
from halfbyte.trainer.training.callbacks import StepCallback
from halfbyte.trainer.training.metrics import sync_rows
from halfbyte.trainer.training.module import DiffusionModule
from halfbyte.trainer.training.skipped_steps import STOPPED


class Checkpointer(StepCallback):
    """Saves checkpoints after optimizer steps.

    The training thread only copies the state to the host. A thread, `saves`, writes the copy; a checkpoint appears
    when it is complete on the disk, and older ones are deleted after that. The next save waits for the one before.
    """

    def __init__(
        self,
        world: World,
        root: Path,
        saves: Background,
        *,
        every: int,
        keep: int,
        last_step: int,
        global_batch: BatchSize,
        resume: checkpoint.Checkpoint | None,
    ) -> None:
        self.world = world
        self.root = root
        self.saves = saves
        self.every = every
        self.keep = keep
        self.last_step = last_step
        self.global_batch = global_batch
        self.resume = resume
        self._host = HostCopies(world.device)
        self._prepared = False

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Restores optimizer, average, gradient scaler and counts, after Lightning has built the optimizer.

        Raises:
            RecipeError: the saved state does not fit this optimizer.
        """
        if self.resume is None:
            return
        try:
            checkpoint.restore_optimizer(trainer.optimizers[0], self.resume.optimizer)
        except ValueError as error:
            raise RecipeError(
                f"--resume: {self.resume.folder}: {error}. Another version of halfbyte or of a library wrote the"
                " checkpoint: resume with that version, or start a new run from its weights:"
                f" lora.init_from={self.resume.folder / ADAPTER_FILE} output.dir=runs/other"
            ) from error
        if self.resume.average is not None:
            pl_module.weights.restore(by_parameter(pl_module.denoiser, self.resume.average))
        if self.resume.scaler:
            trainer.precision_plugin.load_state_dict(self.resume.scaler)
        if pl_module.skipped_steps is not None:
            pl_module.skipped_steps.restore(self.resume.skipped_steps)

    def on_step_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Saves after every `every`-th step, after the last one, and when the run is to stop.

        Raises:
            BaseException: the error of an earlier save.
        """
        self.saves.raise_error()
        step = module.step
        if step % self.every == 0 or step == self.last_step or trainer.should_stop:
            self.save(trainer, module)
        elif self.world.is_leader and not self._prepared:
            # The optimizer has its state now. Allocating the memory takes longer than copying to it.
            self._prepared = True
            self.saves.start(
                partial(
                    self._host.reserve, _copied_bytes(trainer, module, trained_parameters(module.denoiser))
                )
            )

    def save(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Copies the state, and starts to write it; every process must call this.

        Raises:
            NonFiniteError: the adapter has NaN or infinite values, which the last row of metrics may not show
                yet. A checkpoint of such weights would replace a good one.
            BaseException: the error of an earlier save.
        """
        weights = trained_parameters(module.denoiser)
        if not _all_finite(weights.values()):
            raise NonFiniteError(f"step {module.step}: the adapter has values that are not finite; {STOPPED}")
        if not self.world.is_leader:
            return
        self.saves.wait()
        self._prepared = True
        self._host.reserve(_copied_bytes(trainer, module, weights))
        with module.weights.swapped_in():
            adapters = {ADAPTER_FILE: self._host.copies(adapter_tensors(weights))}
        if module.weights.averaged:
            adapters[checkpoint.TRAINED_FILE] = self._host.copies(adapter_tensors(weights))
        accumulation = int(trainer.accumulate_grad_batches)
        snapshot = checkpoint.snapshot(
            checkpoint.Position(module.step, module.step * accumulation, self.global_batch),
            write_adapter=partial(_write_adapters, module, adapters),
            optimizer=checkpoint.named_optimizer_state(trainer.optimizers[0]),
            scaler=trainer.precision_plugin.state_dict(),
            skipped_steps=None if module.skipped_steps is None else module.skipped_steps.counts,
            copied=self._host.copies,
        )
        self.saves.start(partial(self._write, snapshot, self._host.mark()))

    def _write(self, snapshot: checkpoint.Snapshot, copied: torch.cuda.Event | None) -> None:
        """Writes a checkpoint and deletes old ones; runs in a thread."""
        if copied is not None:
            copied.synchronize()
        sync_rows(self.root.parent)
        checkpoint.write_checkpoint(self.root, snapshot)
        checkpoint.prune(self.root, self.keep)


def _all_finite(weights: Iterable[nn.Parameter]) -> bool:
    # Reads each weight once and allocates nothing; `isfinite` takes eight times as long on the CPU.
    ends = [end for weight in weights for end in torch.aminmax(weight.detach())]
    return bool(torch.stack(ends).isfinite().all())


def _copied_bytes(trainer: Trainer, module: DiffusionModule, weights: Mapping[str, nn.Parameter]) -> int:
    """Returns the bytes on the host that a copy of the state takes."""
    adapter = size_of(adapter_tensors(weights))
    optimizer = size_of(checkpoint.optimizer_tensors(trainer.optimizers[0]))
    return (2 if module.weights.averaged else 1) * adapter + optimizer


def _write_adapters(
    module: DiffusionModule, adapters: Mapping[str, Mapping[str, Tensor]], folder: str
) -> None:
    """Writes the adapter that users see; if that is an average, also the trained weights."""
    settings = adapter_settings(module.denoiser)  # the same at every step
    for file, tensors in adapters.items():
        write_adapter(module.family.pipeline_class, tensors, settings, folder, file)
