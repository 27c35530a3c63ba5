"""The folders a recipe names: made absolute, and found to exist before anything else is done."""

import os
import re
from pathlib import Path

from halfbyte.trainer.recipe_file import Document, KeyPath
from halfbyte.trainer.recipe_schema import shown

# owner/name as the Hub accepts it.
_HUB_NAME = re.compile(r"(?!.*(?:--|\.\.|\.git$))[A-Za-z0-9][\w.-]{0,95}/\w(?:[\w.-]{0,94}\w)?", re.ASCII)


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
    _resolve(document, ("model", "transformer"), must_exist=True, file=True)
    _resolve_adapter(document)
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


def _resolve_adapter(document: Document) -> None:
    path: KeyPath = ("lora", "init_from")
    written = document.at(path)
    # runs/dog is no repository where there is a folder runs, as for pictures.
    if isinstance(written, str) and is_repository(written):
        folder = document.place(path).base / written
        if not folder.exists() and not folder.parent.is_dir():
            return
    _resolve(document, path, must_exist=True, file=True)


def _resolve(
    document: Document,
    path: KeyPath,
    *,
    base: Path | None = None,
    must_exist: bool = False,
    file: bool = False,
) -> Path | None:
    """The absolute folder (or `file`) a field names, put into the document; None where the field names none."""
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
            path, f"got '{written}', but there is no {'file or ' if file else ''}folder {folder}"
        )
    return folder
