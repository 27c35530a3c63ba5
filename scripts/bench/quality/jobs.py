"""The jobs of the quality benchmark, each in its own process: a training run, or a base's velocities."""

import logging
import shutil
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from transformers.utils import logging as transformers_logging

from halfbyte.trainer.data.prepare import prepare
from halfbyte.trainer.denoiser.load import load_denoiser
from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.quantize.run import quantize
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.run import run
from halfbyte.trainer.runtime.world import World, join, read_world
from halfbyte.trainer.training.loop import validation_of
from halfbyte.trainer.training.metrics import VALIDATION, read_validation
from halfbyte.trainer.training.validation import Validation
from scripts.bench.quality.bases import Base, loading


@dataclass(frozen=True)
class Bench:
    """The settings that all jobs share."""

    recipe: Path
    overrides: Sequence[str]
    folder: Path  # for runs, which are deleted after they have been read

    def settings(self, base: Base, *more: str) -> Recipe:
        """Returns the recipe with a base's settings, without steps that cost time and do not affect the results."""
        quiet = (
            "sample.prompts=[]",
            "sample.references=null",
            "sample.every=0",
            "output.export_base=false",
            "output.self_check=false",
        )
        settings = [*quiet, *self.overrides, *base.settings, *more]
        made = self.calibrated(base)
        if made.is_dir():  # a run before has searched its scales
            settings += [f"model.transformer={made}", "quant.scale_search=none"]
        return load_recipe(self.recipe, settings)

    def calibrated(self, base: Base) -> Path:
        """Returns the folder of the base's transformer if it is made once for all runs, else None."""
        return self.folder / "calibrated" / base.name


@dataclass(frozen=True)
class Trained:
    """A training run's validation loss."""

    base: str
    seed: int
    before: float
    after: float
    after_by_sigma: dict[float, float]
    seconds: float


@dataclass(frozen=True)
class Velocities:
    """The predictions of a base before any training."""

    base: str
    sigmas: list[float]  # of each point, which is an image at a sigma
    predicted: list[
        numpy.ndarray
    ]  # of each point, (C * h * w,) fp32; not tensors, which take a file each to send
    loss: float  # the validation loss


def start_process() -> None:
    """Prepares a process: one thread, because more gain nothing at these sizes, and no progress bars."""
    torch.set_num_threads(1)
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def calibrate(bench: Bench, base: Base, samples: int) -> None:
    """Makes the transformer of a calibrated base, which later runs find."""
    quantize(bench.settings(base), bench.calibrated(base), samples, read_world(), Console(quiet=True))


def train(bench: Bench, base: Base, seed: int) -> Trained:
    """Trains a whole run."""
    began = time.perf_counter()
    folder = bench.folder / f"{base.name} {seed}"
    recipe = bench.settings(base, f"train.seed={seed}", f"output.dir={folder}")
    world = read_world()
    with loading(base, FAMILIES[recipe.model.family], recipe.quant.skip):
        run(recipe, world, console=Console(quiet=True), resume=False)
    first, *_, last = read_validation(folder / VALIDATION)
    shutil.rmtree(folder)
    return Trained(base.name, seed, first.loss, last.loss, dict(last.by_sigma), time.perf_counter() - began)


def velocities(bench: Bench, base: Base) -> Velocities:
    """Returns the predictions on the held-out images."""
    recipe = bench.settings(base, "train.seed=0")
    world, family = opened(recipe)
    validation = untrained_validation(bench, base, recipe, family, world)
    sigmas: list[float] = []
    predicted: list[numpy.ndarray] = []
    losses: list[float] = []
    for points, velocity, target in validation.predictions():
        sigmas += [point.sigma for point in points]
        predicted += list(velocity.flatten(1).cpu().numpy())
        losses += (velocity - target).square().flatten(1).mean(1).tolist()
    return Velocities(base.name, sigmas, predicted, statistics.fmean(losses))


def opened(recipe: Recipe) -> tuple[World, Family]:
    """Returns the world of this process, and the recipe's model."""
    world = read_world()
    join(world)
    model = recipe.model
    return world, FAMILIES[model.family].open(
        model.path, model.revision, model.max_sequence_length, model.transformer, model.text_encoder
    )


def untrained_validation(
    bench: Bench, base: Base, recipe: Recipe, family: Family, world: World
) -> Validation:
    """Returns the recipe's validation on an untrained base."""
    console = Console(quiet=True)
    prepared = prepare(recipe, family, world, console)
    with loading(base, type(family), recipe.quant.skip):
        denoiser = load_denoiser(recipe, family, world, console).denoiser
    return validation_of(recipe, family, world, prepared, denoiser)
