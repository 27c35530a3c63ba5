"""Callbacks around the training step: validation, metrics, sample images and interruption.

Lightning calls the callbacks in the order of the trainer's list, which `loop.train` builds: Interruption,
WarmUp, Averager, Validator, MetricsRecorder, Checkpointer (see `checkpointer`), Sampler. After each optimizer
step the order matters: the average is updated before anything uses it, the validation loss is known before its
row of metrics is written, and the Checkpointer knows if the run is about to stop.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT

from halfbyte.trainer.errors import NonFiniteError
from halfbyte.trainer.runtime.progress import Progress
from halfbyte.trainer.runtime.signals import SIGNALS
from halfbyte.trainer.runtime.world import World, barrier, exchange, max_over_processes
from halfbyte.trainer.training.metrics import MetricsWriter, StepMetrics
from halfbyte.trainer.training.module import DiffusionModule
from halfbyte.trainer.training.skipped_steps import STOPPED
from halfbyte.trainer.training.validation import Validation

# Overflows in a row that a float16 run survives. torch's gradient scaler starts at 2**16 and halves its scale
# at each overflow: after 24 the scale is 2**-8, so the scale is not the reason for the next one.
_MOST_OVERFLOWS = 24


class StepCallback(Callback):
    """A callback that acts after each optimizer step.

    Lightning's `on_train_batch_end` runs after every micro-batch. With gradient accumulation only each
    `accumulate_grad_batches`-th micro-batch ends with an optimizer step.
    """

    def on_step_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Runs once after each optimizer step, in every process."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Calls `on_step_end` after the last micro-batch of an optimizer step."""
        # A resumed run counts `batch_idx` from 0 again. Checkpoints are only written between optimizer steps,
        # so the modulo stays right.
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_step_end(trainer, pl_module)


class WarmUp(Callback):
    """Runs the warm-up of CUDA graphs once before the first step; comes before all callbacks that measure.

    At this point the optimizer exists. That matters because a joined optimizer moves the parameters to new
    addresses when it is built, and recorded graphs read them at fixed addresses.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Runs the warm-up."""
        self.run()


class Averager(StepCallback):
    """Updates the average of the weights; comes before all callbacks that use it."""

    def on_step_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Adds the new weights to the average; a step that was left out has none."""
        if not module.skips_now:
            module.weights.update(module.step)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Puts the average into the model for good, so that the export has it.

        Done here and not after `Trainer.fit`: the average must be bitwise identical to the last checkpoint's,
        and may not be once Lightning has moved the model to the CPU.
        """
        pl_module.weights.apply_average()


class Validator(StepCallback):
    """Measures the loss on held-out images: before the first step, every `every` steps, and after the last.

    Comes before the MetricsRecorder, which writes the validation loss into the row of the same step.
    """

    def __init__(
        self,
        validation: Validation,
        writer: MetricsWriter | None,
        progress: Progress | None,
        *,
        every: int,
        last_step: int,
    ) -> None:
        self.validation = validation
        self.writer = writer
        self.progress = progress
        self.every = every
        self.last_step = last_step

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Measures step 0, the model before any training; a resumed run has measured it already."""
        if pl_module.step == 0:
            self.measure(pl_module)

    def on_step_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Measures after every `every`-th step and after the last one."""
        if module.step == self.last_step or (self.every and module.step % self.every == 0):
            module.validation_loss = self.measure(module)

    def measure(self, module: DiffusionModule) -> float:
        """Measures the loss now and returns it; every process must call this."""
        with module.weights.swapped_in():
            measured = self.validation.measure(module.step)
        if self.writer is not None:
            self.writer.write_validation(measured)
        if self.progress is not None:
            self.progress.remark = f"validation {measured.loss:.4f}"
        return measured.loss


class MetricsRecorder(StepCallback):
    """Writes metrics, shows progress, and stops a run whose loss or gradients are NaN or infinite.

    The values of steps that were left out (see `SkippedSteps`) stop nothing.
    """

    def __init__(
        self,
        world: World,
        writer: MetricsWriter | None,
        progress: Progress | None,
        *,
        rate: Callable[[torch.optim.Optimizer], float],
        every: int,
        last_step: int,
    ) -> None:
        self.world = world
        self.writer = writer
        self.progress = progress
        self.rate = rate
        self.every = every
        self.last_step = last_step
        self.last: StepMetrics | None = None
        self._samples = 0  # trained on since the last row, over all processes
        self._started = 0.0
        self._overflows = 0  # consecutive rows of metrics with an overflow
        self._finite: torch.Tensor | None = None  # on the device: are all losses since the last row finite?
        self._tolerated = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Starts the clock."""
        # In float16 the gradient scaler skips a step whose gradients overflow, and lowers its scale: no
        # reason to stop. Only a plugin with a scaler has a state.
        self._tolerated = _MOST_OVERFLOWS if trainer.precision_plugin.state_dict() else 0
        if self.progress is not None:
            self.progress.restart()
        self._started = time.perf_counter()
        self._samples = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Counts the samples of a micro-batch; all processes take the same number."""
        self._samples += len(batch.positions) * self.world.size
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Writes a row of metrics after every `every`-th step, the last step and each validation.

        Raises:
            NonFiniteError: a loss since the last row is NaN or infinite, or the gradient norm is for too many
                rows in a row.
        """
        step = module.step
        # One loss per micro-batch of this step.
        losses, module.losses = module.losses, []
        validation_loss, module.validation_loss = module.validation_loss, None
        mean = torch.stack(losses).float().mean()
        # A loss without a row must not be lost if it is NaN: the next row's loss is NaN then.
        if not module.skips_now:
            finite = mean.isfinite()
            self._finite = finite if self._finite is None else self._finite & finite
        if step % self.every and step != self.last_step and validation_loss is None:
            # No `.item()` in steps without a row: it would wait for the GPU.
            if self.progress is not None:
                self.progress.advance(step)
            return
        loss = mean if self._finite is None else torch.where(self._finite, mean, math.nan)
        self._finite = None
        if self.world.size > 1:
            with exchange(self.world):
                torch.distributed.all_reduce(loss)
            loss /= self.world.size
        value = loss.item()
        assert module.grad_norm is not None
        grad_norm = float(module.grad_norm.item())
        now = time.perf_counter()
        pace = self._samples / max(now - self._started, 1e-9)
        self._samples, self._started = 0, now
        if not module.skips_now:
            self._overflows = 0 if math.isfinite(grad_norm) else self._overflows + 1
            self._refuse(step, value, grad_norm)
        device = self.world.device
        memory = _peak_bytes(module, device) / 2**30 if device.type == "cuda" else 0.0
        lr = self.rate(trainer.optimizers[0])
        skipped = None if module.skipped_steps is None else module.skipped_steps.total
        self.last = StepMetrics(step, value, lr, grad_norm, pace, memory, validation_loss, skipped)
        if self.writer is not None:
            self.writer.write(self.last)
        if self.progress is not None:
            self.progress.advance(step, f"loss {value:.4f}")

    def _refuse(self, step: int, loss: float, grad_norm: float) -> None:
        if not math.isfinite(loss) or self._overflows > self._tolerated:
            raise NonFiniteError(
                f"step {step}: the loss is {loss} and the gradient norm {grad_norm}; {STOPPED}"
            )


def _peak_bytes(module: DiffusionModule, device: torch.device) -> int:
    """Returns the peak of the run's device memory so far, in bytes.

    With CUDA graphs (`forward_fn`) it is the reserved memory: the pool of a graph counts as allocated only
    while the graph is recorded, but stays in use for the whole run.
    """
    if module.forward_fn is not None:
        return torch.cuda.max_memory_reserved(device)
    return torch.cuda.max_memory_allocated(device)


class Sampler(StepCallback):
    """Generates sample images every `every` steps; `run` generates the first and the last ones."""

    def __init__(self, world: World, draw: Callable[[int], object], *, every: int, last_step: int) -> None:
        self.world = world
        self.draw = draw
        self.every = every
        self.last_step = last_step

    def on_step_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Generates images in the leader process; the other processes wait."""
        if self.every and module.step % self.every == 0 and module.step != self.last_step:
            if self.world.is_leader:
                module.denoiser.eval()
                with module.weights.swapped_in():
                    self.draw(module.step)
                module.denoiser.train()
            barrier(self.world)


class Interruption(StepCallback):
    """Turns a stopping signal into a stop after the current optimizer step, in every process at once.

    Before the first step, and at the second signal, the run ends immediately. Comes before all other
    callbacks, for two reasons: their work before training can take minutes and must be interruptible, and the
    Checkpointer must see that the run is to stop.
    """

    def __init__(self, world: World, last_step: int) -> None:
        self.world = world
        self.last_step = last_step
        self.stopped = False

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Puts our handlers back after Lightning has replaced that of SIGTERM, whose end has exit code 0."""
        SIGNALS.reinstall()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Lets a signal wait until the step that begins here is done."""
        SIGNALS.defer(True)

    def on_step_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Stops all processes if any of them got a signal."""
        number = max_over_processes(self.world, SIGNALS.received or 0)
        if number and module.step < self.last_step:
            # The processes without a signal end with the same exit code.
            SIGNALS.received = number
            self.stopped = True
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Lets signals end the run immediately again: all its steps are in the last checkpoint."""
        SIGNALS.defer(False)
