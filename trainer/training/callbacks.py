"""What happens around the training step: metrics, checkpoints, samples, stopping."""

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT

from halfbyte.trainer.adapters.lora import by_parameter, save_adapter, trained_parameters
from halfbyte.trainer.adapters.saved import ADAPTER_FILE
from halfbyte.trainer.errors import HalfbyteError, RecipeError
from halfbyte.trainer.run_folder import checkpoint
from halfbyte.trainer.runtime.progress import Progress
from halfbyte.trainer.runtime.world import World, any_process, barrier
from halfbyte.trainer.training.metrics import MetricsWriter, StepMetrics
from halfbyte.trainer.training.module import DiffusionModule
from halfbyte.trainer.training.validation import Validation

# The scale begins at 2**16 and is halved each time: by then it is gone, and it is not the scale.
_MOST_OVERFLOWS = 24
_STOPPED = (
    "the run is stopped and earlier checkpoints are kept. Try a lower optimizer.lr, train.max_grad_norm: 1.0, or"
    " compute_dtype: bfloat16 instead of float16"
)


class StepCallback(Callback):
    """A callback that acts between optimizer steps; Lightning's own hooks count micro-batches."""

    def on_step_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Called once after each optimizer step, in every process."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.on_step_end(trainer, pl_module)


class WarmUp(Callback):
    """Runs once what steps need before the first; stands before everything that measures.

    By then the optimizer is built, and has moved the parameters if it moves them: recordings read them where they are.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Lightning's hook."""
        self.run()


class Averager(StepCallback):
    """Keeps the average of the weights; stands before everything that looks at it."""

    def on_step_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        """See `StepCallback`."""
        module.weights.update(module.step)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Lightning's hook: what is exported is the average to the bit that the last checkpoint has, which it might
        not be once Lightning has moved the model to the CPU."""
        pl_module.weights.apply_average()


class Validator(StepCallback):
    """Measures the loss on held-out pictures: before the first step, every so often, and after the last.

    Stands before the Recorder, which writes the number beside the step's own.
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
        """Lightning's hook: the base alone, as the adapters start."""
        if pl_module.step == 0:
            self.measure(pl_module)

    def on_step_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        """See `StepCallback`."""
        if module.step == self.last_step or (self.every and module.step % self.every == 0):
            module.validation_loss = self.measure(module)

    def measure(self, module: DiffusionModule) -> float:
        """Measures now; every process must call it."""
        with module.weights.swapped_in():
            measured = self.validation.measure(module.step)
        if self.writer is not None:
            self.writer.write_validation(measured)
        if self.progress is not None:
            self.progress.remark = f"validation {measured.loss:.4f}"
        return measured.loss


class MetricsRecorder(StepCallback):
    """Writes metrics, shows progress, and stops a run whose loss is no number."""

    def __init__(
        self,
        world: World,
        writer: MetricsWriter | None,
        progress: Progress | None,
        *,
        rate: Callable[[torch.optim.Optimizer], float],
        samples_per_step: int,
        every: int,
        last_step: int,
    ) -> None:
        self.world = world
        self.writer = writer
        self.progress = progress
        self.rate = rate
        self.samples_per_step = samples_per_step
        self.every = every
        self.last_step = last_step
        self.last: StepMetrics | None = None
        self._since = 0
        self._started = 0.0
        self._overflows = 0  # rows in a row
        self._tolerated = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Lightning's hook."""
        # What overflows in float16 is a step that the gradient scaler leaves out, to go on with a smaller scale.
        self._tolerated = _MOST_OVERFLOWS if trainer.precision_plugin.state_dict() else 0
        if self.progress is not None:
            self.progress.restart()
        self._started = time.perf_counter()
        self._since = pl_module.step

    def on_step_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        """See `StepCallback`."""
        step = module.step
        losses, module.losses = module.losses, []
        validation_loss, module.validation_loss = module.validation_loss, None
        if step % self.every and step != self.last_step and validation_loss is None:
            if self.progress is not None:
                self.progress.advance(step)
            return
        loss = torch.stack(losses).float().mean()
        if self.world.size > 1:
            torch.distributed.all_reduce(loss)
            loss /= self.world.size
        value = loss.item()
        assert module.grad_norm is not None
        grad_norm = float(module.grad_norm.item())
        now = time.perf_counter()
        pace = (step - self._since) * self.samples_per_step / max(now - self._started, 1e-9)
        self._since, self._started = step, now
        self._overflows = 0 if math.isfinite(grad_norm) else self._overflows + 1
        if not math.isfinite(value) or self._overflows > self._tolerated:
            raise HalfbyteError(
                f"step {step}: the loss is {value} and the gradient norm {grad_norm}; {_STOPPED}"
            )
        device = self.world.device
        memory = _peak_bytes(module, device) / 2**30 if device.type == "cuda" else 0.0
        lr = self.rate(trainer.optimizers[0])
        self.last = StepMetrics(step, value, lr, grad_norm, pace, memory, validation_loss)
        if self.writer is not None:
            self.writer.write(self.last)
        if self.progress is not None:
            self.progress.advance(step, f"loss {value:.4f}")


def _peak_bytes(module: DiffusionModule, device: torch.device) -> int:
    """What a recorded step computes in is taken throughout, and counts as allocated only while it is recorded."""
    if module.forward_fn is not None:
        return torch.cuda.max_memory_reserved(device)
    return torch.cuda.max_memory_allocated(device)


class Checkpointer(StepCallback):
    """Saves at optimizer boundaries, every so often and at the end; puts the optimizer back at the start."""

    def __init__(
        self,
        world: World,
        root: Path,
        *,
        every: int,
        keep: int,
        last_step: int,
        global_batch: int,
        resume: checkpoint.Checkpoint | None,
    ) -> None:
        self.world = world
        self.root = root
        self.every = every
        self.keep = keep
        self.last_step = last_step
        self.global_batch = global_batch
        self.resume = resume

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Lightning's hook: optimizers exist, nothing has run. Raises RecipeError for a state that fits no more."""
        if self.resume is None:
            return
        try:
            checkpoint.restore_optimizer(trainer.optimizers[0], self.resume.optimizer)
        except ValueError as error:
            raise RecipeError(
                f"--resume: {self.resume.folder}: {error}. Another version of halfbyte or of a library wrote it: go on"
                " with that one, or start a new run from its weights:"
                f" lora.init_from={self.resume.folder / ADAPTER_FILE} output.dir=runs/other"
            ) from error
        if self.resume.average is not None:
            pl_module.weights.restore(by_parameter(pl_module.denoiser, self.resume.average))
        if self.resume.scaler:
            trainer.precision_plugin.load_state_dict(self.resume.scaler)

    def on_step_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        """See `StepCallback`."""
        step = module.step
        if step % self.every == 0 or step == self.last_step or trainer.should_stop:
            self.save(trainer, module)

    def save(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Saves now; every process must call it.

        Raises HalfbyteError where the weights are no numbers any more, as they may be since the last row of metrics:
        a checkpoint of them would push out the good ones.
        """
        weights = trained_parameters(module.denoiser).values()
        if not torch.stack([parameter.isfinite().all() for parameter in weights]).all():
            raise HalfbyteError(
                f"step {module.step}: the adapter holds values that are not finite; {_STOPPED}"
            )
        if self.world.is_leader:
            accumulation = int(trainer.accumulate_grad_batches)
            position = checkpoint.Position(module.step, module.step * accumulation, self.global_batch)
            checkpoint.save_checkpoint(
                self.root,
                position,
                write_adapter=lambda folder: _write_adapters(module, folder),
                optimizer=checkpoint.named_optimizer_state(trainer.optimizers[0]),
                scaler=trainer.precision_plugin.state_dict(),
            )
            checkpoint.prune(self.root, self.keep)
        barrier(self.world)


def _write_adapters(module: DiffusionModule, folder: str) -> None:
    """What a user is to see under the usual name; beside it, where it is an average, the weights that train."""
    pipeline_class = module.family.pipeline_class
    with module.weights.swapped_in():
        save_adapter(module.denoiser, pipeline_class, folder)
    if module.weights.averaged:
        save_adapter(module.denoiser, pipeline_class, folder, checkpoint.TRAINED_FILE)


class Sampler(StepCallback):
    """Draws the recipe's prompts every so often; the run itself draws them before and after."""

    def __init__(self, world: World, draw: Callable[[int], object], *, every: int, last_step: int) -> None:
        self.world = world
        self.draw = draw
        self.every = every
        self.last_step = last_step

    def on_step_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        """See `StepCallback`."""
        if self.every and module.step % self.every == 0 and module.step != self.last_step:
            if self.world.is_leader:
                module.denoiser.eval()
                with module.weights.swapped_in():
                    self.draw(module.step)
                module.denoiser.train()
            barrier(self.world)


class Interruption(StepCallback):
    """Turns Ctrl-C and SIGTERM into a stop at the next optimizer boundary, in every process at once.

    Before the first step, and when asked twice, they end the run where it is. Stands before all others: what those do
    ahead of training can take minutes, and the Checkpointer saves when the run is to stop.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.signal: int | None = None
        self.stopped = False
        self._stepping = False
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Lightning's hook; after it has set its own handlers, which would end the run with exit code 0."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Lightning's hook: from here on there is a step to finish."""
        self._stepping = True

    def on_step_end(self, trainer: Trainer, module: DiffusionModule) -> None:
        """See `StepCallback`."""
        if any_process(self.world, self.signal is not None):
            self.stopped = True
            trainer.should_stop = True

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Lightning's hook."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, _: object) -> None:
        if self.signal is not None or not self._stepping:
            raise KeyboardInterrupt
        self.signal = number
