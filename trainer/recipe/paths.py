"""The folders a recipe names: made absolute, and found to exist before anything else is done."""

import os
import re
from pathlib import Path

from halfbyte.trainer.hub.reference import is_folder, is_repository
from halfbyte.trainer.recipe.document import Document, KeyPath
from halfbyte.trainer.wording import shown

_REVISION = re.compile(r"\w[\w./+-]{0,99}")


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
