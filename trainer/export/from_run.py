"""`halfbyte export`: the files of a run, or of one of its checkpoints, which may still be training.

The run's folder is only read, but for what is exported into it. A checkpoint's adapter is copied first and held
against its checksum, for a run that goes on deletes old checkpoints.
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
from halfbyte.trainer.recipe.load import load_written
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.run_folder.checkpoint import copy_adapter
from halfbyte.trainer.run_folder.folder import RunFolder
from halfbyte.trainer.run_folder.pinned_base import open_base, started_from
from halfbyte.trainer.runtime.device_memory import when_full
from halfbyte.trainer.runtime.world import World

_WHEN_FULL = (
    "the device ran out of memory, and earlier exports are as they were; without a GPU (CUDA_VISIBLE_DEVICES= ahead of"
    " the command) the same is exported, more slowly"
)


@dataclass(frozen=True)
class ExportRequest:
    """What of a run is exported."""

    step: int | None = None  # None: the newest checkpoint
    formats: Sequence[LoraFormat] | None = None  # None: as the recipe says
    base: bool = False
    merged: bool = False
    text_encoder: bool = False  # T5, in NF4
    check: bool = True


@when_full(lambda: _WHEN_FULL)
def export_run(root: Path, request: ExportRequest, world: World, console: Console) -> Exported:
    """Exports into the run's folder where the checkpoint is that of its last step, else into `exports/STEP` there.

    Raises RecipeError where `root` is no run or has no such checkpoint, ExportError as `export_trained` does,
    OutOfMemory.
    """
    run = RunFolder(root)
    if not run.recipe.is_file():
        raise RecipeError(
            f"{root}: holds no {run.recipe.name}; expected the folder of a run (a recipe's output.dir)"
        )
    recipe = load_written(run.recipe)
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
            # Read from a copy, whose path says nothing.
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
    """Raises RecipeError for what the run's base does not have, before anything is loaded."""
    held = base_recipe(recipe, family)
    for asked, option, instead in (
        (request.base, "--base", "it is the model that the recipe names"),
        (request.merged, "--merged", "merge the adapter with diffusers' fuse_lora, which is exact"),
    ):
        if asked and held is None:
            raise RecipeError(f"{option}: the run's base is not quantized (quant.type: none); {instead}")
    if request.text_encoder:
        check_text_encoder(family.t5)
