"""Implements `halfbyte quantize`: writes a recipe's packed transformer, for training and stock diffusers."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from halfbyte.quant.convert.calibrate import LayerFit
from halfbyte.quant.files.atomic import put_in_place, work_folder, write_file
from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.quant.layers.exact import write_exact
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.serialize import save_quantized
from halfbyte.trainer.data.prepare import prepare
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.denoiser.load import keep_exact
from halfbyte.trainer.denoiser.settings import DTYPES, quant_recipe
from halfbyte.trainer.errors import HalfbyteError, LaunchError, RecipeError
from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.quantize.calibration import calibrate_for
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.device_memory import when_full
from halfbyte.trainer.runtime.world import World, join

REPORT = "calibration.json"
_SHOWN = 5  # number of layers to list, those with the largest error
_WHEN_FULL = (
    "the device ran out of memory; nothing was written. Use a smaller data.resolution, or train.batch_size=1"
)


@dataclass(frozen=True)
class Quantized:
    """The result of a quantization."""

    folder: Path
    layers: int  # number of quantized layers
    nbytes: int  # memory of the transformer on a device
    fits: list[LayerFit]  # output errors of the calibrated layers; empty without calibration


def quantize(recipe: Recipe, folder: Path, samples: int, world: World, console: Console) -> Quantized:
    """Quantizes the recipe's transformer into `folder`, calibrated on `samples` of its images.

    With 0 samples, weights are rounded to the nearest code.

    Raises:
        RecipeError: Raised before anything is loaded: `folder` is not empty, the recipe does not quantize, or
            the weights are not available in full precision.
        LaunchError: There is more than one process.
        DataError: The images cannot be used.
        OutOfMemory: The device or the host is full.
    """
    settings = quant_recipe(recipe)
    if world.size > 1:
        raise LaunchError("halfbyte quantize runs in one process; start it without a launcher")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder}: not empty; expected a new folder")
    if settings is None:
        raise RecipeError("quant.type: got none, expected nf4, fp4 or int8")
    if samples and settings.quant_type == "int8":
        raise RecipeError(
            "quant.type: got int8, which cannot be calibrated; set --samples 0, or quant.type to nf4 or fp4"
        )
    model = recipe.model
    family = FAMILIES[model.family].open(
        model.path, model.revision, model.max_sequence_length, model.transformer, model.text_encoder
    )
    original = _original(family)
    if samples and original is None:
        raise RecipeError(
            f"model.transformer: got the single file {model.transformer}, but calibration needs a folder in diffusers'"
            " layout; name such a folder, or set --samples 0"
        )
    join(world)
    with when_full(lambda: _WHEN_FULL):
        denoiser, fits = _quantized(recipe, family, original, samples, world, console)
    with work_folder(folder) as work:
        save_quantized(denoiser, work)
        if recipe.quant.exact:
            _write_exact(recipe, denoiser, original, work)
        if fits:
            report = {"samples": samples, "layers": [asdict(fit) for fit in fits]}
            write_file(work / REPORT, json.dumps(report, indent=1) + "\n")
        put_in_place(work, folder)
    layers = sum(isinstance(module, QuantizedLayer) for module in denoiser.modules())
    return Quantized(folder, layers, int(denoiser.get_memory_footprint()), fits)


def _quantized(
    recipe: Recipe, family: Family, original: Path | None, samples: int, world: World, console: Console
) -> tuple[Any, list[LayerFit]]:
    """Returns the quantized transformer and the output errors of its layers.

    `original` is the folder of the weights in full precision.
    """
    prepared = prepare(recipe, family, world, console) if samples else None
    dtype = DTYPES[recipe.quant.compute_dtype]
    denoiser = load_base(family, quant_recipe(recipe), device=world.device, dtype=dtype, console=console)
    # Reject layer names that a run would reject before spending time on calibration.
    keep_exact(family, denoiser, recipe.quant.exact)
    if prepared is None or original is None:
        return denoiser, []
    try:
        fits = calibrate_for(
            recipe,
            family,
            denoiser,
            original,
            prepared,
            samples=samples,
            device=world.device,
            console=console,
        )
    except HalfbyteError:
        raise
    except ValueError as error:
        raise RecipeError(f"calibration: {error}; try another quant.compute_dtype, or --samples 0") from error
    return denoiser, fits


def _write_exact(recipe: Recipe, denoiser: Any, original: Path | None, work: Path) -> None:
    """Writes the exact weights of quant.exact next to the packed ones, where runs on the folder find them."""
    packed = [path for path in recipe.quant.exact if isinstance(denoiser.get_submodule(path), QuantizedLayer)]
    if packed:
        assert original is not None, "quantize() rejects single files"
        with ShardedWeights(original) as weights:
            write_exact(packed, weights, work, DTYPES[recipe.quant.compute_dtype])


def quantized_lines(quantized: Quantized) -> Iterator[str]:
    """Yields the lines to print about the result."""
    yield f"{quantized.layers} layers, {quantized.nbytes / 2**20:,.1f} MiB: {quantized.folder}"
    fits = quantized.fits
    if fits:
        before, after = (torch.tensor([getattr(fit, end) for fit in fits]) for end in ("before", "after"))
        yield (
            f"output error, median over {len(fits)} layers: {before.median():.2%} with rounding to nearest,"
            f" {after.median():.2%} calibrated ({REPORT})"
        )
        for fit in sorted(fits, key=lambda fit: -fit.after)[:_SHOWN]:
            yield f"  {fit.path}: {fit.before:.2%} -> {fit.after:.2%}"
    # An absolute path, because owner/name would name a Hub repository.
    yield f"to train on it: {shlex.quote(f'model.transformer={quantized.folder.absolute()}')}"


def _original(family: Family) -> Path | None:
    """Returns the folder of the weights in full precision, or None for a single file.

    Raises:
        RecipeError: The weights are already quantized.
    """
    folder = family.denoiser_folder
    if folder is not None and family.denoiser_config.get("quantization_config") is not None:
        raise RecipeError(f"{folder}: already quantized; name the model that it was made from")
    return folder
