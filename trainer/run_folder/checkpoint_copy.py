"""The adapter of one of a run's checkpoints, copied before it is read: a run that goes on deletes old checkpoints."""

import hashlib
import json
import logging
import shutil
from pathlib import Path

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.run_folder.checkpoint import ADAPTER_FILE, folders
from halfbyte.trainer.run_folder.folder import RunFolder

log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"


def copy_adapter(run: RunFolder, step: int | None, copies: Path) -> str:
    """Copies a checkpoint's adapter into a folder, whole by its checksum; gives the checkpoint's name.

    Without `step` the newest that is whole. Raises RecipeError where there is none.
    """
    saved = folders(run.checkpoints)
    names = ", ".join(str(int(folder.name.removeprefix("step-"))) for folder in saved)
    if not saved:
        raise RecipeError(f"{run.root}: has no checkpoint yet; the first comes after checkpoint.every steps")
    if step is not None:
        saved = [folder for folder in saved if folder.name == f"step-{step:06d}"]
        if not saved:
            raise RecipeError(f"--checkpoint: {run.root} has none of step {step}; it has {names}")
    for folder in reversed(saved):
        fault = _copy_whole(folder, copies / ADAPTER_FILE)
        if fault is None:
            return folder.name
        log.warning("checkpoint %s cannot be used: %s", folder, fault)
    raise RecipeError(f"{run.checkpoints}: {saved[-1].name} is damaged, and there is no other to take")


def _copy_whole(folder: Path, copy: Path) -> str | None:
    """What is wrong with the checkpoint, None where the copy is whole."""
    try:
        wanted = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))[ADAPTER_FILE]
        shutil.copyfile(folder / ADAPTER_FILE, copy)
    except (OSError, ValueError, KeyError) as error:
        return f"it is not whole: {error}"
    with copy.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    return None if found == wanted else f"{ADAPTER_FILE} does not match its checksum"
