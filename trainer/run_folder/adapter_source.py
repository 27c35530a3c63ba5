"""Finds the adapter that a setting names: a file, a folder, a run, or a Hub repository."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.trainer.adapters.formats import PEFT_CONFIG, PEFT_FILE
from halfbyte.trainer.adapters.listed_digests import require_intact
from halfbyte.trainer.adapters.read import find_file
from halfbyte.trainer.adapters.saved import ADAPTER_FILE
from halfbyte.trainer.errors import HalfbyteError, RecipeError
from halfbyte.trainer.hub.download import download
from halfbyte.trainer.hub.reference import HubReference
from halfbyte.trainer.run_folder.checkpoint_folders import copy_adapter, folders
from halfbyte.trainer.run_folder.folder import RunFolder

log = logging.getLogger(__name__)


@contextmanager
def adapter_at(path: Path) -> Iterator[Path]:
    """Provides the file or folder that `lora.init_from` names; it may exist only inside the context.

    For a run without an exported adapter, that is a copy of its newest complete checkpoint's.

    Raises:
        RecipeError, HubError: there is no adapter.
    """
    run, reference = RunFolder(path), HubReference.of(path)
    if reference is not None:
        yield download_adapter(reference.name, reference.revision)
    elif not (run.adapter / ADAPTER_FILE).is_file() and folders(run.checkpoints):
        with tempfile.TemporaryDirectory() as copies:
            log.info(
                "%s has no exported adapter yet; using its checkpoint %s",
                path,
                copy_adapter(run.checkpoints, None, Path(copies)),
            )
            yield Path(copies) / ADAPTER_FILE
    else:
        yield path


def require_adapter(path: Path) -> str | None:
    """Checks that `lora.init_from` names an adapter; returns its commit on the Hub, or None.

    Raises:
        RecipeError, HubError: there is no adapter.
    """
    try:
        with adapter_at(path) as found:
            require_intact(find_file(found))
            return None if HubReference.of(path) is None else found.name
    except HalfbyteError as error:
        raise type(error)(f"lora.init_from: {error}") from error


def download_adapter(name: str, revision: str | None) -> Path:
    """Downloads only the adapter of a repository; returns its folder, whose name is the commit.

    Raises:
        RecipeError: the repository has no adapter under the file names of diffusers or PEFT.
        HubError: the download failed.
    """
    folder = download(name, revision, (ADAPTER_FILE, PEFT_CONFIG))
    if not (folder / ADAPTER_FILE).is_file():
        folder = download(name, folder.name, (PEFT_FILE, PEFT_CONFIG))
        if not (folder / PEFT_FILE).is_file():
            raise RecipeError(
                f"{name}: holds neither a pipeline (model_index.json) nor an adapter ({ADAPTER_FILE} or {PEFT_FILE})."
                f" If its adapter has another file name, download it and name the folder: hf download {name} FILE"
                " --local-dir FOLDER"
            )
    log.info("using the adapter %s at commit %s", name, folder.name)
    return folder
