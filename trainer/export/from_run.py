"""Implements `halfbyte export`: exports a checkpoint of a run, which may still be training.

Apart from the exported files, nothing in the run's folder changes. The checkpoint's adapter is copied first
and verified by its checksum, because a run that is still training deletes old checkpoints.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from halfbyte.trainer.adapters.formats import LoraFormat, formats_for
from halfbyte.trainer.adapters.saved import ADAPTER_FILE, read_saved
from halfbyte.trainer.denoiser.load import load_run_base
from halfbyte.trainer.denoiser.settings import base_recipe
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.export.export import Exported, ExportSettings, export_saved
from halfbyte.trainer.export.text_encoder import check_text_encoder
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.run_folder.checkpoint_folders import copy_adapter
from halfbyte.trainer.run_folder.folder import RunFolder, written_recipe
from halfbyte.trainer.run_folder.pinned_base import open_base, started_from
from halfbyte.trainer.runtime.device_memory import when_full
from halfbyte.trainer.runtime.world import World

_WHEN_FULL = (
    "the device ran out of memory; earlier exports are unchanged. Put CUDA_VISIBLE_DEVICES= before the command to"
    " export the same files on the CPU, which is slower"
)


@dataclass(frozen=True)
class ExportRequest:
    """The parts of a run to export."""

    step: int | None = None  # None: the newest checkpoint
    formats: Sequence[LoraFormat] | None = None  # None: the recipe's output.formats
    base: bool = False  # the quantized transformer
    merged: bool = False  # the transformer with the adapter merged in
    text_encoder: bool = False  # T5 in NF4
    check: bool = True  # check the export in stock diffusers


@when_full(lambda: _WHEN_FULL)
def export_run(root: Path, request: ExportRequest, world: World, console: Console) -> Exported:
    """Exports a checkpoint of the run at `root`.

    The checkpoint of the last step is exported into the run's folder, any other checkpoint into exports/STEP
    there.

    Raises:
        RecipeError: `root` is not a run, has no such checkpoint, or cannot be exported as requested.
        ExportError: See `export_trained`.
        OutOfMemory: The device or the host is full.
    """
    run = RunFolder(root)
    if not run.recipe.is_file():
        raise RecipeError(
            f"{root}: contains no {run.recipe.name}; expected the folder of a run (a recipe's output.dir)"
        )
    recipe = written_recipe(run)
    with tempfile.TemporaryDirectory() as copies:
        checkpoint = copy_adapter(run.checkpoints, request.step, Path(copies))
        adapter_file = Path(copies) / ADAPTER_FILE
        finished = checkpoint == f"step-{recipe.train.steps:06d}"
        target = run if finished else RunFolder(root / "exports" / checkpoint)
        digests = FileDigests(recipe.data.cache_folder / "digests")
        family = open_base(run, recipe.model, digests)
        try:
            adapter = read_saved(adapter_file)
        except RecipeError as error:
            # The error names the temporary copy, so add the path of the checkpoint.
            raise RecipeError(f"{run.checkpoints / checkpoint}: {error}") from error
        _check_request(request, recipe, family)
        formats = recipe.output.formats if request.formats is None else tuple(request.formats)
        formats_for(adapter, formats)
        denoiser = None
        if request.base or request.merged or request.check:
            denoiser = load_run_base(recipe, family, world.device, console)
        console.print("exporting", highlight=False)
        settings = ExportSettings(
            recipe.output.dir.name,
            formats,
            request.base,
            request.check,
            int(checkpoint.removeprefix("step-")),
            base_recipe(recipe, family),
            request.merged,
            world.device if request.text_encoder else None,
            started_from(run, recipe.lora.init_from),
        )
        return export_saved(family, denoiser, adapter_file, target, settings)


def _check_request(request: ExportRequest, recipe: Recipe, family: Family) -> None:
    """Rejects options that the run's base does not support, before anything is loaded. Raises RecipeError."""
    quant = base_recipe(recipe, family)
    for requested, option, advice in (
        (request.base, "--base", "use the model that the recipe names"),
        (request.merged, "--merged", "merge the adapter with diffusers' fuse_lora, which is exact"),
    ):
        if requested and quant is None:
            raise RecipeError(f"{option}: the run's base is not quantized (quant.type: none); {advice}")
    if request.text_encoder:
        check_text_encoder(family.t5)
