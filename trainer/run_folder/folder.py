"""The folder of a run: its layout, and the check that a run may write into it."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from halfbyte.quant.files.atomic import flush, is_unfinished, make_folder, recover, recover_all, write_file
from halfbyte.quant.files.digest import sha256_of
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.recipe.load import load_written
from halfbyte.trainer.recipe.recipe import Recipe, differences
from halfbyte.trainer.run_folder.batching import check_batching
from halfbyte.trainer.run_folder.checkpoint_folders import (
    folders,
    is_unusable,
    newest_sound,
    recover_checkpoints,
    refusal,
)
from halfbyte.trainer.run_folder.lock import LOCK_FILES, lock_exports
from halfbyte.trainer.run_folder.saved_state import read_state

log = logging.getLogger(__name__)

# Prefixes of settings that a resumed run may change freely: they affect what a run reports and stores, or only
# the steps that are still to come, not the results so far.
_FREE = (
    "output.",
    "sample.",
    "checkpoint.",
    "validation.every",
    "data.cache_dir",
    "model.cache_base",
    "train.steps",
    "train.on_nonfinite",
)
# The places of the data. They may change freely if the run has a record of the data's content.
_COMPARED_BY_CONTENT = re.compile(r"(data|validation|data\.sets\[\d+\])\.path: ")
# Settings that a resumed run may change with a warning: they decide where and how the run computes, and
# change its results only by rounding.
EXECUTION_SETTINGS = (
    "model.stream_text_encoder",
    "train.gradient_checkpointing",
    "train.attention",
    "train.fused_adapters",
    "train.fused_blocks",
    "train.stream_blocks",
    "train.cuda_graphs",
)
# Settings whose product with the number of processes must stay the same, see `batching`.
_BATCHING = ("train.batch_size", "train.grad_accumulation")
# The first line, so that a file whose end was cut off still has it.
_CHECKSUM = re.compile(rb"# SHA-256 of the lines below: ([0-9a-f]{64})\n")


@dataclass(frozen=True)
class RunFolder:
    """The paths inside `output.dir`."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The recipe of the run, with all defaults and overrides filled in."""
        return self.root / "recipe.yaml"

    @property
    def pin(self) -> Path:
        """The exact base that the run was started on, see `pinned_base`."""
        return self.root / "base.json"

    @property
    def data(self) -> Path:
        """The record of the data that the run was started on, see `data.record`."""
        return self.root / "training_data.jsonl.gz"

    @property
    def checkpoints(self) -> Path:
        """The folder with one subfolder per checkpoint."""
        return self.root / "checkpoints"

    @property
    def samples(self) -> Path:
        """The folder of the sample images."""
        return self.root / "samples"

    @property
    def comparison(self) -> Path:
        """The sheet that compares the sample images before and after training."""
        return self.root / "samples.png"

    @property
    def adapter(self) -> Path:
        """The exported LoRA."""
        return self.root / "adapter"

    @property
    def base(self) -> Path:
        """The exported quantized transformer."""
        return self.root / "transformer"

    @property
    def can_go_on(self) -> bool:
        """True if the run has an undamaged checkpoint or an exported adapter, so that its settings are fixed."""
        return newest_sound(self.checkpoints) is not None or self.adapter.is_dir()


def begin(folder: RunFolder, recipe: Recipe) -> None:
    """Makes or continues the run's folder: completes what a killed process left, and writes the recipe."""
    make_folder(folder.root)
    with lock_exports(folder.root):  # waits for an export of another process, whose work files are here too
        recover_all(folder.root)
        for exported in (folder.adapter, folder.base):
            recover(exported)
    recover_checkpoints(folder.checkpoints)
    text = recipe.to_yaml()
    write_file(folder.recipe, f"# SHA-256 of the lines below: {sha256_of(text)}\n{text}")
    flush(folder.root)


def written_recipe(folder: RunFolder) -> Recipe:
    """Loads the recipe that the run wrote; warns if it was changed since.

    Raises:
        RecipeError: it cannot be read.
    """
    try:
        recipe = load_written(folder.recipe)
        content = folder.recipe.read_bytes()
    except (RecipeError, OSError) as error:
        raise RecipeError(
            f"{error}\n{folder.recipe} is the run's own copy of its recipe, and is damaged. Put back an intact copy of"
            " the file. To resume with the settings that you give now, which must be those of the run, delete it"
        ) from error
    checksum = _CHECKSUM.match(content)  # runs of version 0.2 and older have none
    if checksum is not None and sha256_of(content[checksum.end() :]) != checksum[1].decode():
        log.warning(
            "%s was edited or damaged after the run wrote it: check its settings. To accept them, delete line 1",
            folder.recipe,
        )
    return recipe


def claim(folder: RunFolder, recipe: Recipe, *, resume: bool, processes: int = 1) -> None:
    """Checks that the run may write into `folder`; changes nothing.

    A resumed run may change how it computes, with a warning. Before its first checkpoint it may change any
    setting.

    Raises:
        RecipeError: the folder is not empty and not a run, holds a run that is not resumed, has only damaged
            checkpoints, or the recipe changes settings that a resumed run must keep.
    """
    root = folder.root
    if root.exists() and not root.is_dir():
        raise RecipeError(f"output.dir: {root} is a file; expected a folder")
    holds_run = folder.recipe.is_file()
    if resume and is_unusable(folder.checkpoints):
        raise refusal(folder.checkpoints)
    if not holds_run and resume and folder.can_go_on:
        log.warning(
            "--resume: %s is missing; the settings given now are taken for those of the run", folder.recipe
        )
        _check_batching(folder, recipe, processes)
        return
    if not holds_run:
        if root.is_dir() and not all(_is_of_a_start(entry.name) for entry in root.iterdir()):
            raise RecipeError(
                f"output.dir: {root} is not empty and not the folder of a run; choose a new folder, such as"
                " output.dir=runs/other"
            )
        return
    if not resume:
        saved = folders(folder.checkpoints)
        state = f"its last checkpoint is {saved[-1].name}" if saved else "it has no checkpoint yet"
        raise RecipeError(
            f"output.dir: {root} already holds a run ({state}). Continue it with --resume, or choose a new folder, such"
            " as output.dir=runs/other"
        )
    if not folder.can_go_on:
        return  # nothing was trained yet: the run starts at step 0, with any settings
    _check_batching(folder, recipe, processes)
    before = written_recipe(folder)
    changed = [line for line in differences(before, recipe) if not line.startswith(_FREE)]
    if folder.data.is_file():
        changed = [line for line in changed if not _COMPARED_BY_CONTENT.match(line)]
    rounding_only = [line for line in changed if line.startswith((*EXECUTION_SETTINGS, *_BATCHING))]
    if len(rounding_only) < len(changed):
        raise RecipeError(
            f"--resume: these settings differ from the run's recipe, {folder.recipe}, and would change its results. Set"
            " them back, or start a new run with another output.dir:\n  "
            + "\n  ".join(line for line in changed if line not in rounding_only)
        )
    if rounding_only:
        log.warning(
            "--resume: these settings change how the run computes; its results stay the same up to rounding: %s",
            ", ".join(rounding_only),
        )
    steps = before.train.steps, recipe.train.steps
    last = min(steps) - 1
    rates = [recipe.lr_schedule.factor(last, total) for total in steps]
    if rates[0] != rates[1]:
        log.warning(
            "--resume: with train.steps %d instead of %d the %s schedule changes: at step %d the rate is"
            " %.3g of optimizer.lr instead of %.3g",
            *reversed(steps),
            recipe.lr_schedule.name,
            last + 1,
            *reversed(rates),
        )


def _is_of_a_start(name: str) -> bool:
    """Returns True for files that are there before the recipe: a run killed at its start leaves them."""
    return name in LOCK_FILES or is_unfinished(name)


def _check_batching(folder: RunFolder, recipe: Recipe, processes: int) -> None:
    newest = newest_sound(folder.checkpoints)
    if newest is not None:
        check_batching(read_state(newest).position, recipe.train, processes)
