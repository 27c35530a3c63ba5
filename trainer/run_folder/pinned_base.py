"""Pins the base that a run was started on, so that resume, export and sampling use exactly that base.

A recipe names a repository, whose main branch moves, or a folder, whose files may be overwritten. The pin has
the commits and the digests of the files.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.quant.files.atomic import write_file
from halfbyte.trainer.adapters.listed_digests import checksum_of
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
"""Setting that names a Hub repository -> the repository's commit."""

INIT_FROM = "lora.init_from"


@dataclass(frozen=True)
class PinnedBase:
    """The identity of a base: commits of Hub repositories, and digests of local files."""

    commits: Commits  # includes the commit of the adapter that the run started from
    transformer: str | None  # digest of the weights; None if a commit identifies them
    text_encoder: str | None  # digest of a separate T5 in a local folder
    rest: str | None  # digest of the encoders, the VAE and the scheduler; None if a commit identifies them


def base_of(family: Family, digests: FileDigests) -> PinnedBase:
    """Returns the identity of an opened family; reads files whose digests are not known yet."""
    source, transformer, t5 = family.source, family.transformer, family.t5
    rest = [part for part in family.components(own_t5=t5.is_own) if part != "transformer"]
    return PinnedBase(
        family.commits,
        None if transformer.revision is not None else family.denoiser_fingerprint(digests),
        family.t5_fingerprint(digests) if t5.is_own and t5.revision is None else None,
        None if source.revision is not None else source.fingerprint(rest, digests),
    )


def pin_base(run: RunFolder, family: Family, digests: FileDigests, commits: Commits) -> None:
    """Writes the identity of the base into the run's folder, unless a resumed run has it already.

    commits: the result of `find_commits`.
    """
    if run.pin.exists() and run.can_go_on:
        return
    pinned = replace(base_of(family, digests), commits={**commits, **family.commits})
    facts = asdict(pinned)
    write_file(run.pin, json.dumps({**facts, "checksum": checksum_of(facts)}, indent=1) + "\n")


def pinned_commits(run: RunFolder) -> Commits:
    """Returns the commits that the run was started on; empty for a new run.

    Raises:
        RecipeError: the pin cannot be read.
    """
    return _read(run.pin).commits if run.pin.is_file() and run.can_go_on else {}


def find_commits(run: RunFolder, model: ModelSection, init_from: Path | None) -> Commits:
    """Returns the commits of a recipe's repositories: those of the run's start, else the newest.

    Downloads the configurations and the adapter, so that a wrong name in the recipe fails first.

    Raises:
        HubError, RecipeError: see `Family.describe` and `require_adapter`.
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
    """Returns the Hub adapter that the run was started from; None if there was none or it is unknown."""
    reference, commit = HubReference.of(init_from), pinned_commits(run).get(INIT_FROM)
    return None if reference is None or commit is None else HubPart(reference.name, commit)


def at_commit(named: Path, commit: str | None) -> Path:
    """Returns a Hub repository at `commit`; a local path, or a repository without a commit, unchanged."""
    reference = HubReference.of(named)
    return named if reference is None or commit is None else reference.at(commit)


def at_commits(model: ModelSection, commits: Commits) -> ModelSection:
    """Returns the model section with its repositories at `commits`."""
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
    """Opens the base that the run was started on, or for a new run the base that `model` names.

    commits: the result of `find_commits`; None for the run's pinned commits. max_sequence_length: overrides
    the model's.

    Raises:
        HubError: the Hub does not give the base.
        RecipeError: the base does not exist, or its files have changed since the run was started.
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
        log.warning("%s: %s is missing; using the base in its current state", run.root, run.pin.name)
    return family


def _refuse_others(run: RunFolder, pinned: Commits, model: ModelSection) -> None:
    """Raises RecipeError if the model section names another commit than the run was started on."""
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
                f"{field}: got {revision}, but {run.root} was started on {name} at {commit}; set that commit, or"
                f" {nothing}"
            )


def _require(pinned: PinnedBase, found: PinnedBase, run: RunFolder, model: ModelSection) -> None:
    """Raises RecipeError if the base found differs from the pinned one."""

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
        f"{where}: {changed} changed since {run.root} was started on it ({run.pin}). Put the old files back, or start a"
        f" new run on the new files from this run's adapter: lora.init_from={run.root} output.dir=runs/other"
    )


def _read(file: Path) -> PinnedBase:
    try:
        facts: Any = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("expected a JSON object")
        checksum = facts.pop("checksum", None)  # runs of version 0.2 and older have none
        if checksum not in (None, checksum_of(facts)):
            raise ValueError("its checksum does not match")
        if "revision" in facts:  # the older format, in which only model.path could be a repository
            revision = facts.pop("revision")
            facts |= {"commits": {} if revision is None else {PIPELINE: revision}, "text_encoder": None}
        pinned = PinnedBase(**facts)
        if not isinstance(pinned.commits, dict) or not all(
            value is None or isinstance(value, str)
            for value in (*pinned.commits.values(), pinned.transformer, pinned.text_encoder, pinned.rest)
        ):
            raise ValueError("commits and digests must be text")
        return pinned
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RecipeError(
            f"{file}: cannot be read: {error}. Put back an intact copy of it. Without this file the run would use the"
            " base in its current state; delete it to allow that"
        ) from error
