"""The very base that a run was started on: it goes on, is exported and drawn with on no other.

A recipe names a repository, whose main branch moves, or a folder, whose files may be written over.
"""

import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.quant.shards import write_text
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.base import Family
from halfbyte.trainer.file_digests import FileDigests
from halfbyte.trainer.recipe_sections import ModelSection
from halfbyte.trainer.registry import FAMILIES
from halfbyte.trainer.run_folder import RunFolder

log = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class PinnedBase:
    """What tells a base from all others."""

    revision: str | None  # the commit of a Hub repository; None for a folder
    transformer: str | None  # digest of the weights; None where the commit names them
    rest: str | None  # digest of the encoders, the VAE and the scheduler; None where the commit names them


def base_of(family: Family, digests: FileDigests) -> PinnedBase:
    """The base that a family was opened at; files whose digests are not remembered are read."""
    source = family.source
    of_hub = source.revision is not None
    rest = tuple(part for part in family.components() if part != "transformer")
    return PinnedBase(
        source.revision,
        None if of_hub and not family.has_own_transformer else family.denoiser_fingerprint(digests),
        None if of_hub else source.fingerprint(rest, digests),
    )


def pin_base(run: RunFolder, family: Family, digests: FileDigests) -> None:
    """Writes into the run's folder what it is trained on, unless it goes on as it was started."""
    if run.pin.exists() and run.can_go_on:
        return
    work = run.pin.with_name(f".{run.pin.name}.tmp")
    write_text(json.dumps(asdict(base_of(family, digests)), indent=1) + "\n", work)
    work.replace(run.pin)


def open_base(
    run: RunFolder, model: ModelSection, digests: FileDigests, *, max_sequence_length: int | None = None
) -> Family:
    """The family at the base that the run was started on, or at the one that `model` names where it is a new run.

    max_sequence_length: instead of the model's. Raises HubError, and RecipeError where the base is not there, or is
    another one now.
    """
    pinned = _read(run.pin) if run.pin.is_file() and run.can_go_on else None
    revision = model.revision
    if pinned is not None and pinned.revision is not None:
        if revision != pinned.revision and _COMMIT.fullmatch(revision or ""):
            raise RecipeError(
                f"model.revision: got {revision}, but {run.root} was started on {model.path} at {pinned.revision};"
                " expected that commit, or null"
            )
        revision = pinned.revision
    family = FAMILIES[model.family].open(
        model.path, revision, max_sequence_length or model.max_sequence_length, model.transformer
    )
    if pinned is not None:
        _require(pinned, base_of(family, digests), run, model, family)
    elif run.can_go_on:
        log.warning("%s: %s is missing; the base is taken as it is now", run.root, run.pin.name)
    return family


def _require(
    pinned: PinnedBase, found: PinnedBase, run: RunFolder, model: ModelSection, family: Family
) -> None:
    """Raises RecipeError where the base found is not the pinned one."""
    if found == pinned:
        return
    own = pinned.transformer != found.transformer and family.has_own_transformer
    where = f"model.transformer: {model.transformer}" if own else f"model.path: {model.path}"
    changed = (
        "the transformer"
        if pinned.transformer != found.transformer
        else "an encoder, the VAE or the scheduler"
    )
    raise RecipeError(
        f"{where}: {changed} is not what {run.root} was started on ({run.pin}). Put the former files back; or start a"
        f" new run on the new ones from this one's adapter: lora.init_from={run.root} output.dir=runs/other"
    )


def _read(file: Path) -> PinnedBase:
    try:
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return PinnedBase(**facts)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RecipeError(
            f"{file}: cannot be read: {error}; without this file the run's base is taken as it is now"
        ) from error
