"""Makes the paths of a recipe absolute and checks that the folders it reads exist."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from halfbyte.quant.files.patterns import base_folder, is_pattern, matching_files
from halfbyte.trainer.hub.reference import HubData, is_folder, is_repository
from halfbyte.trainer.recipe.document import Document, KeyPath, dotted
from halfbyte.trainer.recipe.fields import SHARD_SUFFIXES
from halfbyte.trainer.wording import in_prose, shown

_REVISION = re.compile(r"\w[\w./+-]{0,99}")


def resolve_folders(document: Document, *, pictures_needed: bool = True) -> None:
    """Replaces relative paths in the document with absolute ones, and records missing folders as problems.

    Paths that a run reads are relative to the recipe file's folder, or to the current folder if given on the command
    line. Paths that it writes are relative to the current folder. If `pictures_needed` is false, data.path need not
    exist: a plan works without images.
    """
    _resolve_model(document)
    _resolve_unless_repository(document, ("model", "transformer"), file=True)
    _resolve_unless_repository(document, ("model", "text_encoder"))
    _resolve_unless_repository(document, ("lora", "init_from"), file=True)
    sets = document.at(("data", "sets"))
    places: list[KeyPath] = [("data", "path")]
    if isinstance(sets, list):
        places += [
            ("data", "sets", index, "path") for index, item in enumerate(sets) if isinstance(item, dict)
        ]
    for place in places:
        _resolve(document, (*place[:-1], "masked_loss", "folder"), must_exist=pictures_needed)
        folders = document.at((*place[:-1], "references", "folders"))
        for index in range(len(folders) if isinstance(folders, list) else 0):
            _resolve(document, (*place[:-1], "references", "folders", index), must_exist=pictures_needed)
    read = {
        dotted(place): _resolve(document, place, must_exist=pictures_needed, suffixes=SHARD_SUFFIXES)
        for place in places
    }
    _resolve(document, ("validation", "path"), must_exist=True, suffixes=SHARD_SUFFIXES)
    _resolve(document, ("sample", "references"), must_exist=True, suffixes=SHARD_SUFFIXES)
    _resolve(document, ("data", "cache_dir"))
    output = _resolve(document, ("output", "dir"), base=Path.cwd())
    for setting, data in read.items():
        if data is not None and output is not None and output.is_relative_to(data):
            message = f"{output} is inside {setting}; the next start would train on its images. Choose another folder"
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
            f"'{written}' is both a Hub repository's name and a folder here; write './{written}' for the folder,"
            " or start from another folder to use the repository"
        )
        document.problem(path, message)


def _resolve_unless_repository(document: Document, path: KeyPath, *, file: bool = False) -> None:
    """Resolves a path that must exist, but leaves the name of a Hub repository unchanged."""
    written = document.at(path)
    name, separator, revision = written.partition("@") if isinstance(written, str) else ("", "", "")
    if is_repository(name):
        # If a folder `runs` exists, runs/dog is a path in it rather than a repository, as in `halfbyte sample`.
        folder = document.place(path).base / name
        if not folder.parent.is_dir():
            if separator and not _REVISION.fullmatch(revision):
                document.problem(
                    path,
                    f"got {shown(written)}, expected a branch, tag or commit after the @, or only owner/name",
                )
            return
    _resolve(
        document,
        path,
        must_exist=True,
        file=file,
        hint="; expected an existing one, or a Hub repository as owner/name",
    )


def _resolve(
    document: Document,
    path: KeyPath,
    *,
    base: Path | None = None,
    must_exist: bool = False,
    file: bool = False,
    suffixes: Sequence[str] = (),
    hint: str = "",
) -> Path | None:
    """Makes the path of a field absolute in the document and returns it; None if the field holds no usable path.

    Args:
        base: the folder that a relative path starts from; by default the one that belongs to where it was written.
        file: accept a file as well as a folder.
        suffixes: accept a file with one of these endings as well as a folder, and a pattern of such files.
        hint: text for the end of the message about a missing path.
    """
    written = document.at(path)
    if not isinstance(written, str):
        return None
    if not written:
        document.problem(path, "got '', expected a folder")
        return None
    if suffixes and re.match("hf:/", written):
        _check_hub_data(document, path, written)
        return None
    try:
        folder = ((base or document.place(path).base) / os.path.expanduser(written)).resolve()
        exists = folder.exists()
    except (OSError, ValueError, RuntimeError) as error:
        # The path is too long, holds a null character, runs in a loop of links or needs missing permissions.
        document.problem(path, f"got {shown(written)}, which is not a usable path: {error}")
        return None
    document.replace(path, str(folder))
    if not exists and suffixes and is_pattern(folder):
        if must_exist:
            _check_pattern(document, path, written, folder)
        return base_folder(folder)
    if exists and not folder.is_dir() and not file and folder.suffix not in suffixes:
        kinds = f"a folder or a {in_prose(suffixes)} file" if suffixes else "a folder"
        document.problem(path, f"got '{written}', expected {kinds}; {folder} is a file")
    elif must_exist and not exists:
        document.problem(
            path, f"got '{written}', but there is no {'file or ' if file else ''}folder {folder}{hint}"
        )
    return folder


def _check_hub_data(document: Document, path: KeyPath, written: str) -> None:
    data = HubData.of(written)
    if path[0] != "data":
        document.problem(path, f"got {shown(written)}, expected a local folder")
    elif data is None or (data.revision is not None and not _REVISION.fullmatch(data.revision)):
        document.problem(
            path,
            f"got {shown(written)}, expected hf://datasets/owner/name, with @revision and a folder if needed",
        )


def _check_pattern(document: Document, path: KeyPath, written: str, pattern: Path) -> None:
    try:
        matching_files(pattern)
    except ValueError as error:
        document.problem(path, f"got '{written}', but {error}")
