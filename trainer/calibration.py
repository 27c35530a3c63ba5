"""A recipe's transformer rounded for the recipe's pictures: what its layers get in training decides on their weights.

The samples are those that the run itself begins with, captions and noise included. Noise levels are drawn alike over
the whole range, whatever the run trains most: sampling goes through all of them.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from halfbyte.quant.calibrate import Fit, calibrate
from halfbyte.quant.shards import ShardedWeights
from halfbyte.trainer.denoiser import DTYPES
from halfbyte.trainer.families.base import Family
from halfbyte.trainer.module import DiffusionModule, Objective
from halfbyte.trainer.prepare import Prepared
from halfbyte.trainer.progress import Shown
from halfbyte.trainer.recipe import Recipe
from halfbyte.trainer.samples import Batch, collate
from halfbyte.trainer.shift import NoShift
from halfbyte.trainer.timesteps import Uniform

_HOST_BYTES = 2 * 10**9  # of second moments, where there is no device
_DEVICE_SHARE = 0.4  # of the device's free memory: rounding a layer takes four times its moment for a while
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
) -> list[Fit]:
    """Rounds the 4-bit layers of `denoiser` anew for `samples` of the recipe's; see `calibrate`.

    original: the folder of the weights in full precision.
    """
    dtype = DTYPES[recipe.quant.compute_dtype]
    batches = list(_batches(recipe, prepared, samples))
    modules = list(_modules(recipe, family, denoiser))
    denoiser.eval()

    def forward(module: DiffusionModule, batch: Batch) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            module.loss(batch.to(device))

    forwards = [
        partial(forward, module, batch) for module, batch in zip(cycle(modules), batches, strict=False)
    ]
    shown = Shown(console, "calibrating", "step")
    try:
        with ShardedWeights(original) as weights:

            def weight(path: str) -> Tensor:
                # Rounded to the compute dtype first, as it is when it is quantized.
                return weights.read(f"{path}.weight").to(device, dtype)

            return calibrate(denoiser, weight, forwards, moment_bytes=_room(device), progress=shown)
    finally:
        shown.close()


def _batches(recipe: Recipe, prepared: Prepared, samples: int) -> Iterator[Batch]:
    pictures = prepared.training_set.dropping(max(recipe.data.caption_dropout, _LEAST_CAPTION_DROPOUT))
    count = -(-samples // recipe.train.batch_size)
    for entries in islice(prepared.plan.micro_batches(), count):
        yield collate([pictures[entry] for entry in entries])


def _modules(recipe: Recipe, family: Family, denoiser: nn.Module) -> Iterator[DiffusionModule]:
    """The training step at each guidance scale that the model will be told, where it is told any."""
    for scale in dict.fromkeys((recipe.objective.guidance_scale, recipe.sample.guidance_scale)):
        yield DiffusionModule(
            family,
            denoiser,
            replace(
                Objective.of(recipe.objective),
                timesteps=Uniform(name="uniform"),
                shift=NoShift(name="none"),
                guidance_scale=scale,
            ),
            build_optimizer=recipe.optimizer.build,
            lr_factor=lambda _: 1.0,
            compute_dtype=DTYPES[recipe.quant.compute_dtype],
            max_grad_norm=None,
            seed=recipe.train.seed,
        )


def _room(device: torch.device) -> int:
    """Bytes of second moments that are held at a time."""
    if device.type != "cuda":
        return _HOST_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(_DEVICE_SHARE * free)
