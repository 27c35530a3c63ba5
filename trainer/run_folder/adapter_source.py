"""Where an adapter is that a run starts from or pictures are drawn with, if it is not simply a file or folder."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.trainer.adapters.formats import PEFT_CONFIG, PEFT_FILE
from halfbyte.trainer.adapters.read import find_file
from halfbyte.trainer.adapters.saved import ADAPTER_FILE
from halfbyte.trainer.errors import HalfbyteError, RecipeError
from halfbyte.trainer.hub.download import download
from halfbyte.trainer.hub.reference import HubReference
from halfbyte.trainer.run_folder.checkpoint import copy_adapter, folders
from halfbyte.trainer.run_folder.folder import RunFolder

log = logging.getLogger(__name__)


@contextmanager
def adapter_at(path: Path) -> Iterator[Path]:
    """The file or folder with the adapter that `lora.init_from` names, as long as it is read.

    Of a run that did not end it is the newest checkpoint's. Raises RecipeError, or HubError.
    """
    run, reference = RunFolder(path), HubReference.of(path)
    if reference is not None:
        yield download_adapter(reference.name, reference.revision)
    elif not (run.adapter / ADAPTER_FILE).is_file() and folders(run.checkpoints):
        with tempfile.TemporaryDirectory() as copies:
            log.info(
                "%s has no adapter yet; its %s is taken",
                path,
                copy_adapter(run.checkpoints, None, Path(copies)),
            )
            yield Path(copies) / ADAPTER_FILE
    else:
        yield path


def require_adapter(path: Path) -> str | None:
    """The commit of the Hub repository that `lora.init_from` names; None where it names none.

    Raises RecipeError or HubError where there is no adapter.
    """
    try:
        with adapter_at(path) as found:
            find_file(found)
            return None if HubReference.of(path) is None else found.name
    except HalfbyteError as error:
        raise type(error)(f"lora.init_from: {error}") from error


def download_adapter(name: str, revision: str | None) -> Path:
    """The snapshot of a Hub repository, named by its commit, with the adapter in it and nothing more.

    Raises RecipeError where it holds none under a name that diffusers or PEFT give it, HubError.
    """
    folder = download(name, revision, (ADAPTER_FILE, PEFT_CONFIG))
    if not (folder / ADAPTER_FILE).is_file():
        folder = download(name, folder.name, (PEFT_FILE, PEFT_CONFIG))
        if not (folder / PEFT_FILE).is_file():
            raise RecipeError(
                f"{name}: holds neither a pipeline (model_index.json) nor an adapter ({ADAPTER_FILE} or {PEFT_FILE}); a"
                f" file of another name is taken from a folder: hf download {name} FILE --local-dir FOLDER"
            )
    log.info("the adapter is %s at %s", name, folder.name)
    return folder
