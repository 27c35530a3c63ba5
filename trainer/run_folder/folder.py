"""A run's folder: what is where, and whether a run may write into it."""

import logging
from dataclasses import dataclass
from pathlib import Path

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.recipe.load import load_written
from halfbyte.trainer.recipe.recipe import Recipe, differences
from halfbyte.trainer.run_folder.checkpoint import folders, newest

log = logging.getLogger(__name__)

# Settings that change how a run is watched and kept, not what it computes.
_FREE = (
    "output.",
    "sample.",
    "checkpoint.",
    "validation.every",
    "data.cache_dir",
    "model.cache_base",
    "train.steps",
)
# Those that decide where and how it is computed, and change its results by rounding.
HOW_IT_IS_COMPUTED = (
    "model.stream_text_encoder",
    "train.gradient_checkpointing",
    "train.attention",
    "train.fused_adapters",
    "train.fused_blocks",
    "train.stream_blocks",
    "train.cuda_graphs",
)


@dataclass(frozen=True)
class RunFolder:
    """Names inside `output.dir`."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The recipe as it was run, defaults and overrides filled in."""
        return self.root / "recipe.yaml"

    @property
    def pin(self) -> Path:
        """Which base the run was started on, see `pinned_base`."""
        return self.root / "base.json"

    @property
    def checkpoints(self) -> Path:
        """A folder a checkpoint."""
        return self.root / "checkpoints"

    @property
    def samples(self) -> Path:
        """Sample pictures."""
        return self.root / "samples"

    @property
    def comparison(self) -> Path:
        """Before and after, in one picture."""
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
        """Whether something of the run is left that its settings belong to: a whole checkpoint, or what it exported."""
        return newest(self.checkpoints) is not None or self.adapter.is_dir()


def claim(folder: RunFolder, recipe: Recipe, *, resume: bool) -> None:
    """Checks that the run may write here; changes nothing. Raises RecipeError when it may not.

    A run that is resumed may be computed otherwise, which is told; before its first checkpoint it may be another one.
    """
    root = folder.root
    if root.exists() and not root.is_dir():
        raise RecipeError(f"output.dir: {root} is a file; name a folder")
    holds_run = folder.recipe.is_file()
    if not holds_run:
        if root.is_dir() and any(root.iterdir()):
            raise RecipeError(
                f"output.dir: {root} is not empty and holds no run; name a new folder: output.dir=runs/other"
            )
        return
    if not resume:
        saved = folders(folder.checkpoints)
        state = f"its last checkpoint is {saved[-1].name}" if saved else "it has no checkpoint yet"
        raise RecipeError(
            f"output.dir: {root} holds another run ({state}). Go on with it: --resume. Or name a new folder:"
            " output.dir=runs/other"
        )
    if not folder.can_go_on:
        return  # it starts at step 0, as whatever run it is now
    before = load_written(folder.recipe)
    changed = [line for line in differences(before, recipe) if not line.startswith(_FREE)]
    otherwise = [line for line in changed if line.startswith(HOW_IT_IS_COMPUTED)]
    if len(otherwise) < len(changed):
        raise RecipeError(
            f"--resume: these settings differ from the run's own recipe, {folder.recipe}, and would make it another"
            " run:\n  " + "\n  ".join(line for line in changed if line not in otherwise)
        )
    if otherwise:
        log.warning(
            "--resume: computed otherwise from here on, so that it goes on as before up to rounding: %s",
            ", ".join(otherwise),
        )
    steps = before.train.steps, recipe.train.steps
    last = min(steps) - 1
    rates = [recipe.lr_schedule.factor(last, total) for total in steps]
    if rates[0] != rates[1]:
        log.warning(
            "--resume: with train.steps %d instead of %d the %s schedule takes another course: at step %d the rate is"
            " %.3g of optimizer.lr instead of %.3g",
            *reversed(steps),
            recipe.lr_schedule.name,
            last + 1,
            *reversed(rates),
        )
