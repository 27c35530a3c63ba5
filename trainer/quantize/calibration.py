"""A recipe's transformer rounded for the recipe's pictures: what its layers get in training decides on their weights.

The samples are those that the run itself begins with, captions and noise included. Noise levels are drawn alike over
the whole range, whatever the run trains most: sampling goes through all of them.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from halfbyte.quant.convert.calibrate import LayerFit, calibrate
from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.trainer.data.batches import collate
from halfbyte.trainer.data.order import Entry
from halfbyte.trainer.data.prepare import Prepared
from halfbyte.trainer.denoiser.settings import DTYPES
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.objective.shift import NoShift
from halfbyte.trainer.objective.timesteps import Uniform
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.progress import LazyProgress
from halfbyte.trainer.training.module import DiffusionModule, training_module

_HOST_BYTES = 2 * 10**9  # of second moments, where there is no device
_DEVICE_SHARE = 0.4  # of the device's free memory: rounding a layer takes three times its moment besides
# Sampling with classifier-free guidance asks for the empty caption half of the time.
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
    """Rounds the 4-bit layers of `denoiser` anew for `samples` of the recipe's; see `calibrate`.

    original: the folder of the weights in full precision. Raises ValueError where layers get NaN or infinite inputs.
    """
    dtype = DTYPES[recipe.quant.compute_dtype]
    modules = list(_modules(recipe, family, denoiser, dtype))
    pictures = prepared.training_set.dropping(max(recipe.data.caption_dropout, _LEAST_CAPTION_DROPOUT))
    denoiser.eval()

    def forward(module: DiffusionModule, entries: Sequence[Entry]) -> None:
        # Read from the cache each time: all samples at once may be gigabytes.
        batch = collate([pictures[entry] for entry in entries]).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            module.loss(batch)

    batches = islice(prepared.plan.micro_batches(), -(-samples // recipe.train.batch_size))
    forwards = [
        partial(forward, module, entries) for module, entries in zip(cycle(modules), batches, strict=False)
    ]
    shown = LazyProgress(console, "calibrating", "step")
    try:
        with ShardedWeights(original) as weights:

            def weight(path: str) -> Tensor:
                # Rounded to the compute dtype first, as it is when it is quantized.
                return weights.read(f"{path}.weight").to(device, dtype)

            return calibrate(denoiser, weight, forwards, moment_bytes=_room(device), progress=shown)
    finally:
        shown.close()


def _modules(
    recipe: Recipe, family: Family, denoiser: nn.Module, dtype: torch.dtype
) -> Iterator[DiffusionModule]:
    """The training step at each guidance scale that the model will be told, where it is told any."""
    for scale in dict.fromkeys((recipe.objective.guidance_scale, recipe.sample.guidance_scale)):
        changed = {
            "timesteps": Uniform(name="uniform"),
            "shift": NoShift(name="none"),
            "guidance_scale": scale,
        }
        objective = recipe.objective.model_copy(update=changed)
        yield training_module(recipe.model_copy(update={"objective": objective}), family, denoiser, dtype)


def _room(device: torch.device) -> int:
    """Bytes of second moments that are held at a time."""
    if device.type != "cuda":
        return _HOST_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(_DEVICE_SHARE * free)
