"""Checks files against the digests that were written next to them: a checkpoint's manifest, an export's provenance."""

import json
import re
from pathlib import Path
from typing import Any

from halfbyte.quant.files.digest import sha256_file, sha256_of
from halfbyte.quant.files.json_object import read_object
from halfbyte.trainer.errors import RecipeError

MANIFEST = "manifest.json"
"""Stored in a checkpoint, with the SHA-256 of each of its files."""

PROVENANCE_FILE = "halfbyte.json"
"""Stored next to an exported adapter, and at the top of a repository that halfbyte has pushed to."""

CHECKPOINT_NAME = re.compile(r"step-(\d{6,})")
_EXPORT_AGAIN = "export the run again with: halfbyte export RUN"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def require_intact(file: Path, content: bytes | None = None) -> None:
    """Checks a file, if a manifest or the provenance of an export lists it.

    content: the file's bytes, if they have been read; so what is checked is what is used.

    Raises:
        RecipeError: the file differs from what was written, or the list is damaged.
        OSError: the file cannot be read.
    """
    found = _listed(file)
    if found is None:
        return
    source, digest = found
    if digest is None or (sha256_file(file) if content is None else sha256_of(content)) != digest:
        what = f"does not match its checksum in {source}" if digest else f"is not listed in {source}"
        again = (
            "use another checkpoint, or copy it again"
            if source.name == MANIFEST
            else "export it again with: halfbyte export RUN"
        )
        raise RecipeError(f"{file}: {what}, so it is damaged or was changed; {again}")


def read_manifest(folder: Path) -> dict[str, str]:
    """Returns the digests of a checkpoint's files.

    Raises:
        ValueError: there is no manifest, or it is damaged; the message says how.
    """
    manifest = folder / MANIFEST
    digests = read_object(manifest)
    for name, digest in digests.items():
        if Path(name).name != name or not _is_digest(digest):
            raise ValueError(f"{manifest}: has an entry that is no file with its SHA-256: {name!r}")
    return digests


def checksum_of(facts: dict[str, Any]) -> str:
    """Returns the checksum that is stored with the facts in a JSON file."""
    return sha256_of(json.dumps(facts, sort_keys=True))


def _listed(file: Path) -> tuple[Path, str | None] | None:
    """Returns the list next to a file, and the file's digest in it; None if nothing lists the file."""
    manifest = file.with_name(MANIFEST)
    digest = _in_manifest(file) if manifest.is_file() else None
    if digest is not None or _is_checkpoint(file.parent):
        return manifest, digest
    # A format for another program is in a folder of its own.
    for folder in (file.parent, file.parent.parent):
        provenance = folder / PROVENANCE_FILE
        files = _provenance(provenance).get("files")
        name = file.relative_to(folder).as_posix()
        if isinstance(files, dict) and name in files:
            return provenance, files[name]
    return None


def _in_manifest(file: Path) -> str | None:
    """Returns the digest of a file in the manifest next to it; None if it lists no such file."""
    try:
        if _is_checkpoint(file.parent):
            return read_manifest(file.parent).get(file.name)
        # A copied checkpoint, or another program's file of that name.
        digest = read_object(file.with_name(MANIFEST)).get(file.name)
    except ValueError as error:
        raise RecipeError(
            f"{error}; it has the checksum of {file.name}. Use another checkpoint, or to read the file unchecked,"
            " copy it to another folder"
        ) from error
    return digest if _is_digest(digest) else None


def _is_checkpoint(folder: Path) -> bool:
    return CHECKPOINT_NAME.fullmatch(folder.name) is not None and folder.parent.name == "checkpoints"


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _provenance(file: Path) -> dict[str, Any]:
    """Reads the provenance of an export; an empty object if there is none. Raises RecipeError if it is damaged."""
    if not file.is_file():
        return {}
    try:
        facts = read_object(file)
    except ValueError as error:
        raise RecipeError(f"{error}; {_EXPORT_AGAIN}") from error
    checksum = facts.pop("checksum", None)  # exports of version 0.2 and older have none
    if not facts or checksum not in (None, checksum_of(facts)):
        raise RecipeError(f"{file}: damaged or changed; {_EXPORT_AGAIN}")
    return facts
