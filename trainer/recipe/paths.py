"""The folders a recipe names: made absolute, and found to exist before anything else is done."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from halfbyte.trainer.recipe.document import Document, KeyPath
from halfbyte.trainer.recipe.schema import shown

# owner/name as the Hub accepts it.
_HUB_NAME = re.compile(r"(?!.*(?:--|\.\.|\.git$))[A-Za-z0-9][\w.-]{0,95}/\w(?:[\w.-]{0,94}\w)?", re.ASCII)

_REVISION = re.compile(r"\w[\w./+-]{0,99}")


@dataclass(frozen=True)
class HubReference:
    """A Hub repository where a file or folder could be named too: owner/name, or owner/name@revision."""

    name: str
    revision: str | None  # a branch, tag or commit; None: the main branch

    @classmethod
    def of(cls, path: Path | None) -> Self | None:
        """None for files and folders, whose paths are absolute by now."""
        if path is None or path.is_absolute():
            return None
        name, _, revision = path.as_posix().partition("@")
        return cls(name, revision or None) if is_repository(name) else None

    def at(self, commit: str) -> Path:
        """The same repository at a commit, as a recipe would name it."""
        return Path(f"{self.name}@{commit}")


def is_folder(path: str) -> bool:
    """Whether a model's path is written as a folder's."""
    return path.startswith(("./", "../", "/", "~")) or path in (".", "..")


def is_repository(path: str) -> bool:
    """Whether a model's path is written as a Hub repository's."""
    return _HUB_NAME.fullmatch(path) is not None


def resolve_folders(document: Document, *, pictures_needed: bool = True) -> None:
    """Replaces the document's relative paths by absolute ones and notes what is missing.

    Without `pictures_needed` data.path may be, as a plan can do without.

    What a run reads is looked for from the recipe file's folder, or from the current one if it was named on
    the command line; what it writes goes under the current folder.
    """
    _resolve_model(document)
    _resolve_unless_repository(document, ("model", "transformer"), file=True)
    _resolve_unless_repository(document, ("model", "text_encoder"))
    _resolve_unless_repository(document, ("lora", "init_from"), file=True)
    data = _resolve(document, ("data", "path"), must_exist=pictures_needed)
    _resolve(document, ("validation", "path"), must_exist=True)
    _resolve(document, ("sample", "references"), must_exist=True)
    _resolve(document, ("data", "cache_dir"))
    output = _resolve(document, ("output", "dir"), base=Path.cwd())
    if data is not None and output is not None and output.is_relative_to(data):
        message = f"{output} is inside data.path; its pictures would be trained on at the next start"
        document.problem(("output", "dir"), message)


def _resolve_model(document: Document) -> None:
    path: KeyPath = ("model", "path")
    written = document.at(path)
    if not isinstance(written, str):
        return
    if is_folder(written):
        _resolve(document, path, must_exist=True)
    elif is_repository(written) and Path(written).is_dir():
        message = (
            f"'{written}' names a Hub repository, but also a folder here; write './{written}' for the folder,"
            " or start elsewhere for the repository"
        )
        document.problem(path, message)


def _resolve_unless_repository(document: Document, path: KeyPath, *, file: bool = False) -> None:
    """As `_resolve` of what must exist, but for a Hub repository, which stays as it is written."""
    written = document.at(path)
    name, behind, revision = written.partition("@") if isinstance(written, str) else ("", "", "")
    if is_repository(name):
        # runs/dog is no repository where there is a folder runs, as for pictures.
        folder = document.place(path).base / name
        if not folder.parent.is_dir():
            if behind and not _REVISION.fullmatch(revision):
                document.problem(
                    path,
                    f"got {shown(written)}, expected a branch, tag or commit behind the @, or owner/name alone",
                )
            return
    _resolve(
        document,
        path,
        must_exist=True,
        file=file,
        instead="; expected one, or a Hub repository as owner/name",
    )


def _resolve(
    document: Document,
    path: KeyPath,
    *,
    base: Path | None = None,
    must_exist: bool = False,
    file: bool = False,
    instead: str = "",
) -> Path | None:
    """The absolute folder (or `file`) a field names, put into the document; None where the field names none.

    instead: what else is accepted, for the end of a message.
    """
    written = document.at(path)
    if not isinstance(written, str):
        return None
    if not written:
        document.problem(path, "got '', expected a folder")
        return None
    try:
        folder = ((base or document.place(path).base) / os.path.expanduser(written)).resolve()
        exists = folder.exists()
    except (OSError, ValueError, RuntimeError) as error:
        # Too long, with a null character, a loop of links, in a folder one may not look into.
        document.problem(path, f"got {shown(written)}, which cannot be used as a path: {error}")
        return None
    document.replace(path, str(folder))
    if exists and not folder.is_dir() and not file:
        document.problem(path, f"got '{written}', expected a folder; {folder} is a file")
    elif must_exist and not exists:
        document.problem(
            path, f"got '{written}', but there is no {'file or ' if file else ''}folder {folder}{instead}"
        )
    return folder
