"""The training loop of a run: Lightning's Trainer with the module, the data and the callbacks."""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from rich.console import Console
from torch import nn

from halfbyte.trainer.adapters.lora import load_adapter_state
from halfbyte.trainer.cuda_graphs.denoiser import GraphedDenoiser
from halfbyte.trainer.cuda_graphs.warm_up import warm_up
from halfbyte.trainer.data.prepare import Prepared
from halfbyte.trainer.denoiser.settings import DTYPES
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.optim.averages import Ema, TrainedWeights
from halfbyte.trainer.recipe.batch_sizes import batch_at, over_processes
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.run_folder import checkpoint
from halfbyte.trainer.run_folder.folder import RunFolder
from halfbyte.trainer.runtime.background import Background
from halfbyte.trainer.runtime.progress import Progress
from halfbyte.trainer.runtime.signals import SIGNALS
from halfbyte.trainer.runtime.world import World, exchange
from halfbyte.trainer.sample.sampler import PictureSampler
from halfbyte.trainer.training.callbacks import (
    Averager,
    Interruption,
    MetricsRecorder,
    Sampler,
    Validator,
    WarmUp,
)
from halfbyte.trainer.training.checkpointer import Checkpointer
from halfbyte.trainer.training.metrics import MetricsWriter
from halfbyte.trainer.training.module import DiffusionModule, Objective
from halfbyte.trainer.training.preservation import Preservation
from halfbyte.trainer.training.skipped_steps import SkippedSteps
from halfbyte.trainer.training.validation import Validation

log = logging.getLogger(__name__)

_WHEN_FULL = "during training; the last checkpoint is complete"
_WHEN_FULL_SAMPLING = "while generating sample images; the last checkpoint is complete"
_PRECISION = {"bfloat16": "bf16-mixed", "float16": "16-mixed", "float32": "32-true"}


class WhenFull(Protocol):
    """Returns a context that turns an out-of-memory error into OutOfMemory with advice."""

    def __call__(self, when: str, *phases: str) -> AbstractContextManager[None]:
        """Returns the context.

        when: completes the sentence "the device ran out of memory". phases: the names of the plan's phases
        that the work inside the context belongs to.
        """


@dataclass(frozen=True)
class Finished:
    """The state of a run after `train`."""

    done: bool  # False if it was interrupted
    step: int
    seconds: float


@dataclass(frozen=True)
class Training:
    """Everything that the training loop needs."""

    recipe: Recipe
    family: Family
    world: World
    prepared: Prepared
    denoiser: nn.Module
    folder: RunFolder
    saved: checkpoint.Checkpoint | None  # the checkpoint that the run resumes from
    sampler: PictureSampler
    console: Console
    when_full: WhenFull

    @property
    def first_step(self) -> int:
        """The number of optimizer steps done before this start."""
        return self.saved.position.step if self.saved else 0


def train(training: Training) -> Finished:
    """Takes the remaining steps, with validation, checkpoints and sample images in between.

    Raises:
        OutOfMemory: the device is full.
        Stopped: a signal came before the first step, or a second one.
        ProcessLost: another process ended or stopped responding.
    """
    recipe, world, saved = training.recipe, training.world, training.saved
    first_step, last_step = training.first_step, recipe.train.steps
    graphed = GraphedDenoiser(training.denoiser) if records_graphs(recipe, world) else None
    module = _module(training, graphed)
    if world.is_leader:
        for line in recipe.optimizer.advice():
            log.warning(line)
    writer = MetricsWriter(training.folder.root, first_step) if world.is_leader else None
    progress = (
        Progress(training.console, "training", total=last_step, done=first_step) if world.is_leader else None
    )
    interruption = Interruption(world, last_step)
    saves = Background()
    callbacks = [
        interruption,
        *([] if graphed is None else [WarmUp(lambda: _warm_up(graphed, training))]),
        Averager(),
        *_watching(training, writer, progress, saves),
    ]
    trainer = _trainer(training, callbacks)
    began = time.perf_counter()
    try:
        if first_step < last_step:
            full = training.when_full(_WHEN_FULL, "step")
            loader = training.prepared.loader(recipe, world, first_step * recipe.train.grad_accumulation)
            with full, warnings.catch_warnings():
                # Lightning recommends worker processes, but the loader reads ahead in a thread.
                warnings.filterwarnings("ignore", message=".*does not have many workers.*")
                with closing(loader), saves, _interrupts_raised(), exchange(world):
                    trainer.fit(module, loader)
    finally:
        SIGNALS.defer(False)
        if graphed is not None:
            graphed.release()  # frees the graphs' memory for the last sample images
        if progress is not None:
            progress.close()
        if writer is not None:
            writer.close()
    # With no steps left, `Averager.on_train_end` has not run.
    if first_step >= last_step and saved is not None and saved.average is not None:
        load_adapter_state(training.denoiser, saved.average)
    done = first_step >= last_step or not interruption.stopped
    return Finished(done, module.step if first_step < last_step else first_step, time.perf_counter() - began)


def _module(training: Training, graphed: GraphedDenoiser | None) -> DiffusionModule:
    recipe = training.recipe
    train = recipe.train
    most = train.on_nonfinite.most
    return DiffusionModule(
        training.family,
        training.denoiser,
        Objective.of(recipe.objective),
        build_optimizer=recipe.optimizer.build,
        build_weights=_weights(recipe),
        lr_factor=lambda step: recipe.lr_schedule.factor(step, train.steps),
        compute_dtype=DTYPES[recipe.quant.compute_dtype],
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        first_step=training.first_step,
        forward_fn=graphed,
        skipped_steps=None if most is None else SkippedSteps(training.world, most),
        preserve=_preservation(training),
    )


def _preservation(training: Training) -> Preservation | None:
    settings, embedding = training.recipe.objective.preserve, training.prepared.preserved
    if settings is None or embedding is None:
        return None
    device = training.world.device
    return Preservation(
        TextEmbedding(embedding.prompt_embeds.to(device), embedding.pooled_prompt_embeds.to(device)),
        settings.weight,
    )


def _watching(
    training: Training, writer: MetricsWriter | None, progress: Progress | None, saves: Background
) -> Iterator[Callback]:
    """Yields the callbacks that measure, record, save and sample, in the order of their calls.

    saves: writes the checkpoints.
    """
    recipe, world = training.recipe, training.world
    last_step = recipe.train.steps
    if training.prepared.held_out:
        every = recipe.validation.every
        validation = validation_of(recipe, training.family, world, training.prepared, training.denoiser)
        yield Validator(validation, writer, progress, every=every, last_step=last_step)
    yield MetricsRecorder(
        world,
        writer,
        progress,
        rate=recipe.optimizer.rate,
        every=recipe.output.log_every,
        last_step=last_step,
    )
    yield Checkpointer(
        world,
        training.folder.checkpoints,
        saves,
        every=recipe.checkpoint.every,
        keep=recipe.checkpoint.keep,
        last_step=last_step,
        global_batch=over_processes(recipe.train.batch_size, world.size),
        resume=training.saved,
    )

    def draw(step: int) -> None:
        with training.when_full(_WHEN_FULL_SAMPLING, "sample"):
            training.sampler.draw(step)

    yield Sampler(world, draw, every=recipe.sample.every, last_step=last_step)


def validation_of(
    recipe: Recipe, family: Family, world: World, prepared: Prepared, denoiser: nn.Module
) -> Validation:
    """Returns the recipe's validation of `denoiser` on the held-out images."""
    return Validation(
        family,
        denoiser,
        prepared.held_out,
        prepared.held_out_set,
        sigmas=recipe.validation.sigmas,
        guidance_scale=recipe.objective.guidance_scale,
        compute_dtype=DTYPES[recipe.quant.compute_dtype],
        batch_size=recipe.train.batch_size,
        world=world,
    )


def _trainer(training: Training, callbacks: list[Callback]) -> Trainer:
    """Returns Lightning's Trainer with its own checkpoints, logging and progress bar turned off."""
    world, train = training.world, training.recipe.train
    return Trainer(
        accelerator="cuda" if world.device.type == "cuda" else "cpu",
        devices=world.local_size if world.device.type == "cpu" or world.size > 1 else [world.device.index],
        num_nodes=world.nodes,
        strategy=_strategy(world),
        precision=_PRECISION[training.recipe.quant.compute_dtype],
        max_epochs=1,
        max_steps=train.steps - training.first_step,
        accumulate_grad_batches=train.grad_accumulation,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


@contextmanager
def _interrupts_raised() -> Iterator[None]:
    """Raises KeyboardInterrupt in place of Lightning's exit.

    On KeyboardInterrupt Lightning ignores SIGINT from then on, and exits with code 1 and no message.
    """
    try:
        yield
    except SystemExit as left:
        if not isinstance(left.__context__, KeyboardInterrupt):
            raise
        raise left.__context__ from left
    finally:
        SIGNALS.reinstall()


def records_graphs(recipe: Recipe, world: World) -> bool:
    """Returns True if the run's steps run as CUDA graphs: the recipe asks for them, and the device is CUDA."""
    return recipe.train.cuda_graphs and world.device.type == "cuda"


def _warm_up(graphed: GraphedDenoiser, training: Training) -> None:
    recipe, prepared = training.recipe, training.prepared
    dtype, device = DTYPES[recipe.quant.compute_dtype], training.world.device
    shapes = {(batch_at(recipe.train.batch_size, side), size) for side, size in prepared.shapes}
    warm_up(
        graphed,
        training.family,
        sorted(shapes, key=lambda shape: (shape[1], shape[0])),
        TextEmbedding(
            prepared.empty.prompt_embeds.to(device, dtype),
            prepared.empty.pooled_prompt_embeds.to(device, dtype),
        ),
        guidance_scale=recipe.objective.guidance_scale,
        compute_dtype=dtype,
    )


def _weights(recipe: Recipe) -> Callable[[Mapping[str, nn.Parameter], torch.optim.Optimizer], TrainedWeights]:
    """Returns the function that builds the recipe's average of the weights: EMA, or the optimizer's own."""
    ema = recipe.ema
    if ema.decay is None:
        return recipe.optimizer.weights
    decay = ema.decay
    return lambda parameters, _: Ema(parameters, decay=decay, every=ema.every, warmup=ema.warmup)


def _strategy(world: World) -> Strategy:
    if world.size == 1:
        return SingleDeviceStrategy(device=world.device)
    return DDPStrategy(process_group_backend=world.backend, gradient_as_bucket_view=True)
