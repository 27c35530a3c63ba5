"""Calibrates a quantized transformer: rounds its 4-bit weights for the inputs of its layers in training.

Calibration uses the first samples of the run itself, with the same captions and noise. Its timesteps are
uniform over the whole range, whatever distribution the run trains with, because sampling goes through all of
them.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from halfbyte.quant.convert.calibrate import LayerFit, calibrate
from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.trainer.data.batches import collate
from halfbyte.trainer.data.prepare import Prepared
from halfbyte.trainer.data.views.order import Entry
from halfbyte.trainer.denoiser.settings import DTYPES
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.objective.shift import NoShift
from halfbyte.trainer.objective.timesteps import Uniform
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.progress import LazyProgress
from halfbyte.trainer.training.module import DiffusionModule, training_module

_HOST_BYTES = 2 * 10**9  # bytes of second moments on the CPU
_DEVICE_SHARE = 0.4  # of the device's free memory; rounding a layer needs three times its moment in addition
# With classifier-free guidance, half of the predictions in sampling use the empty caption.
_LEAST_CAPTION_DROPOUT = 0.1


def calibrate_for(
    recipe: Recipe,
    family: Family,
    denoiser: nn.Module,
    original: Path,
    prepared: Prepared,
    *,
    samples: int,
    device: torch.device,
    console: Console,
) -> list[LayerFit]:
    """Rounds the 4-bit layers of `denoiser` again, calibrated on `samples` samples of the recipe.

    `original` is the folder of the weights in full precision. See `calibrate` for the method.

    Raises:
        ValueError: The inputs of a layer are NaN or infinite.
    """
    dtype = DTYPES[recipe.quant.compute_dtype]
    modules = list(_modules(recipe, family, denoiser, dtype))
    pictures = prepared.training_set.dropping(_LEAST_CAPTION_DROPOUT)
    denoiser.eval()

    def forward(module: DiffusionModule, entries: Sequence[Entry]) -> None:
        # Read the samples from the cache for each forward: all of them together may be gigabytes.
        batch = collate([pictures[entry] for entry in entries]).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            module.loss(batch)

    batches = _first(samples, prepared.plan.micro_batches())
    forwards = [
        partial(forward, module, entries) for module, entries in zip(cycle(modules), batches, strict=False)
    ]
    progress = LazyProgress(console, "calibrating", "step")
    try:
        with ShardedWeights(original) as weights:

            def weight(path: str) -> Tensor:
                # Round to the compute dtype first, as quantization does.
                return weights.read(f"{path}.weight").to(device, dtype)

            return calibrate(
                denoiser, weight, forwards, moment_bytes=_moment_bytes(device), progress=progress
            )
    finally:
        progress.close()


def _first(samples: int, batches: Iterator[tuple[Entry, ...]]) -> Iterator[tuple[Entry, ...]]:
    """Yields batches until they have at least this many samples."""
    taken = 0
    while taken < samples:
        batch = next(batches)
        taken += len(batch)
        yield batch


def _modules(
    recipe: Recipe, family: Family, denoiser: nn.Module, dtype: torch.dtype
) -> Iterator[DiffusionModule]:
    """Yields the training module for each guidance scale that the model gets: in training and in sampling."""
    for scale in dict.fromkeys((recipe.objective.guidance_scale, recipe.sample.guidance_scale)):
        changed = {
            "timesteps": Uniform(name="uniform"),
            "shift": NoShift(name="none"),
            "guidance_scale": scale,
        }
        objective = recipe.objective.model_copy(update=changed)
        yield training_module(recipe.model_copy(update={"objective": objective}), family, denoiser, dtype)


def _moment_bytes(device: torch.device) -> int:
    """Returns the limit in bytes for the second moments in memory at the same time."""
    if device.type != "cuda":
        return _HOST_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(_DEVICE_SHARE * free)
