"""The very base that a run was started on: it goes on, is exported and drawn with on no other.

A recipe names a repository, whose main branch moves, or a folder, whose files may be written over.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.quant.files.atomic import write_file
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.hub.reference import HubPart, HubReference
from halfbyte.trainer.pretrained.component import PIPELINE
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.recipe.sections import ModelSection
from halfbyte.trainer.run_folder.adapter_source import require_adapter
from halfbyte.trainer.run_folder.folder import RunFolder

log = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")


Commits = Mapping[str, str]
"""Of Hub repositories, by the settings that name them."""

INIT_FROM = "lora.init_from"


@dataclass(frozen=True)
class PinnedBase:
    """What tells a base from all others."""

    commits: Commits  # and that of the adapter that the run started from
    transformer: str | None  # digest of the weights; None where a commit names them
    text_encoder: str | None  # digest of a T5 that was given apart, in a folder
    rest: str | None  # digest of the encoders, the VAE and the scheduler; None where a commit names them


def base_of(family: Family, digests: FileDigests) -> PinnedBase:
    """The base that a family was opened at; files whose digests are not remembered are read."""
    source, transformer, t5 = family.source, family.transformer, family.t5
    rest = [part for part in family.components(own_t5=t5.is_own) if part != "transformer"]
    return PinnedBase(
        family.commits,
        None if transformer.revision is not None else family.denoiser_fingerprint(digests),
        family.t5_fingerprint(digests) if t5.is_own and t5.revision is None else None,
        None if source.revision is not None else source.fingerprint(rest, digests),
    )


def pin_base(run: RunFolder, family: Family, digests: FileDigests, commits: Commits) -> None:
    """Writes into the run's folder what it is trained on, unless it goes on as it was started.

    commits: what `find_commits` gave.
    """
    if run.pin.exists() and run.can_go_on:
        return
    pinned = replace(base_of(family, digests), commits={**commits, **family.commits})
    write_file(run.pin, json.dumps(asdict(pinned), indent=1) + "\n")


def pinned_commits(run: RunFolder) -> Commits:
    """Those that the run was started on; none of a new run. Raises RecipeError where that cannot be read."""
    return _read(run.pin).commits if run.pin.is_file() and run.can_go_on else {}


def find_commits(run: RunFolder, model: ModelSection, init_from: Path | None) -> Commits:
    """The commits that a recipe's repositories are read at: those that the run was started on, or else the newest.

    Configurations are fetched to know, and the adapter; what is wrong with what the recipe names is told before
    anything else is. Raises HubError and RecipeError, see `Family.describe` and `require_adapter`.
    """
    pinned = pinned_commits(run)
    _refuse_others(run, pinned, model)
    started = None if init_from is None else require_adapter(at_commit(init_from, pinned.get(INIT_FROM)))
    model = at_commits(model, pinned)
    family = FAMILIES[model.family].describe(
        model.path, model.revision, model.max_sequence_length, model.transformer, model.text_encoder
    )
    return {**family.commits, **({} if started is None else {INIT_FROM: started})}


def started_from(run: RunFolder, init_from: Path | None) -> HubPart | None:
    """The adapter of the Hub that the run was started from; None where it was none, or its commit is not known."""
    reference, commit = HubReference.of(init_from), pinned_commits(run).get(INIT_FROM)
    return None if reference is None or commit is None else HubPart(reference.name, commit)


def at_commit(named: Path, commit: str | None) -> Path:
    """A repository at a commit, where there is one; whatever else is named, as it is."""
    reference = HubReference.of(named)
    return named if reference is None or commit is None else reference.at(commit)


def at_commits(model: ModelSection, commits: Commits) -> ModelSection:
    """The model, its repositories at the commits."""
    own = {
        field: at_commit(named, commits.get(f"model.{field}"))
        for field, named in (("transformer", model.transformer), ("text_encoder", model.text_encoder))
        if named is not None
    }
    return model.model_copy(update={"revision": commits.get(PIPELINE, model.revision), **own})


def open_base(
    run: RunFolder,
    model: ModelSection,
    digests: FileDigests,
    *,
    commits: Commits | None = None,
    max_sequence_length: int | None = None,
) -> Family:
    """The family at the base that the run was started on, or at the one that `model` names where it is a new run.

    commits: what `find_commits` gave; None: the run's. max_sequence_length: instead of the model's. Raises HubError,
    and RecipeError where the base is not there, or is another one now.
    """
    pinned = _read(run.pin) if run.pin.is_file() and run.can_go_on else None
    if commits is None:
        commits = {} if pinned is None else pinned.commits
        _refuse_others(run, commits, model)
    named = at_commits(model, commits)
    family = FAMILIES[model.family].open(
        named.path,
        named.revision,
        max_sequence_length or named.max_sequence_length,
        named.transformer,
        named.text_encoder,
    )
    if pinned is not None:
        _require(pinned, base_of(family, digests), run, model)
    elif run.can_go_on:
        log.warning("%s: %s is missing; the base is taken as it is now", run.root, run.pin.name)
    return family


def _refuse_others(run: RunFolder, pinned: Commits, model: ModelSection) -> None:
    """Raises RecipeError where the model names another commit than the run was started on."""
    named = [(PIPELINE, "model.revision", model.path, model.revision, "null")]
    for field, path in (("transformer", model.transformer), ("text_encoder", model.text_encoder)):
        reference = HubReference.of(path)
        if reference is not None:
            setting = f"model.{field}"
            named.append((setting, setting, reference.name, reference.revision, "no revision"))
    for setting, field, name, revision, nothing in named:
        commit = pinned.get(setting)
        if commit is not None and revision != commit and _COMMIT.fullmatch(revision or ""):
            raise RecipeError(
                f"{field}: got {revision}, but {run.root} was started on {name} at {commit}; expected that commit, or"
                f" {nothing}"
            )


def _require(pinned: PinnedBase, found: PinnedBase, run: RunFolder, model: ModelSection) -> None:
    """Raises RecipeError where the base found is not the pinned one."""

    def differs(digest: str, setting: str) -> bool:
        of = (pinned.commits.get(setting), found.commits.get(setting))
        return getattr(pinned, digest) != getattr(found, digest) or of[0] != of[1]

    if differs("transformer", "model.transformer"):
        changed, own = "the transformer", "transformer"
    elif differs("text_encoder", "model.text_encoder"):
        changed, own = "T5", "text_encoder"
    elif differs("rest", PIPELINE):
        changed, own = "an encoder, the VAE or the scheduler", "path"
    else:
        return
    named = getattr(model, own)
    where = f"model.path: {model.path}" if named is None else f"model.{own}: {named}"
    raise RecipeError(
        f"{where}: {changed} is not what {run.root} was started on ({run.pin}). Put the former files back; or start a"
        f" new run on the new ones from this one's adapter: lora.init_from={run.root} output.dir=runs/other"
    )


def _read(file: Path) -> PinnedBase:
    try:
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if "revision" in facts:  # as it was written when model.path alone could be a repository
            revision = facts.pop("revision")
            facts |= {"commits": {} if revision is None else {PIPELINE: revision}, "text_encoder": None}
        return PinnedBase(**facts)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RecipeError(
            f"{file}: cannot be read: {error}; without this file the run's base is taken as it is now"
        ) from error
