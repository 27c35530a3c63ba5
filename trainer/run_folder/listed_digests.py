"""Checks an adapter's file against the digests that were written next to it, by a checkpoint or an export."""

import json
from pathlib import Path
from typing import Any

from halfbyte.quant.files.digest import sha256_file, sha256_of
from halfbyte.trainer.adapters.saved import MANIFEST
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.run_folder.checkpoint_folders import is_checkpoint

PROVENANCE_FILE = "halfbyte.json"
"""Stored next to an exported adapter, and at the top of a repository that halfbyte has pushed to."""


def require_intact(file: Path) -> None:
    """Checks a file, if a manifest or the provenance of an export lists it.

    Raises:
        RecipeError: the file differs from what was written, or the list is damaged.
    """
    found = _listed(file)
    if found is None:
        return
    source, digest = found
    if digest is None or sha256_file(file) != digest:
        what = f"does not match its checksum in {source}" if digest else f"is not listed in {source}"
        again = (
            "use another checkpoint"
            if source.name == MANIFEST
            else "export it again with: halfbyte export RUN"
        )
        raise RecipeError(f"{file}: {what}, so it is damaged or was changed; {again}")


def checksum_of(facts: dict[str, Any]) -> str:
    """Returns the checksum that is stored with the facts in a JSON file."""
    return sha256_of(json.dumps(facts, sort_keys=True))


def _listed(file: Path) -> tuple[Path, str | None] | None:
    """Returns the list next to a file, and the file's digest in it; None if nothing lists the file."""
    digests = _entries(file.with_name(MANIFEST))
    if is_checkpoint(file.parent):
        return file.with_name(MANIFEST), digests.get(file.name)
    # A format for another program is in a folder of its own.
    for folder in (file.parent, file.parent.parent):
        provenance = folder / PROVENANCE_FILE
        files = _provenance(provenance).get("files")
        name = file.relative_to(folder).as_posix()
        if isinstance(files, dict) and name in files:
            return provenance, files[name]
    return None


def _provenance(file: Path) -> dict[str, Any]:
    """Reads the provenance of an export; an empty object if there is none. Raises RecipeError if it is damaged."""
    facts = _entries(file)
    checksum = facts.pop("checksum", None)  # exports of version 0.2 and older have none
    if file.is_file() and (not facts or checksum not in (None, checksum_of(facts))):
        raise RecipeError(f"{file}: damaged or changed; export the run again with: halfbyte export RUN")
    return facts


def _entries(file: Path) -> dict[str, Any]:
    """Reads a JSON object; an empty one if there is none, because others use these names too."""
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}
