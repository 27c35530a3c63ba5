"""What all commands share: how they fail, what they log, and quiet libraries."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import typer
from rich.console import Console

from halfbyte.trainer.cli.interrupts import INTERRUPTED, ended_at_once
from halfbyte.trainer.errors import HalfbyteError, OutOfMemory
from halfbyte.trainer.recipe.document import Document
from halfbyte.trainer.runtime.world import World


@dataclass
class Command:
    """What a command knows of its run when it fails; filled in as it goes."""

    world: World | None = None
    document: Document | None = None
    """The recipe as it was read: messages about its settings get file and line."""


@contextmanager
def reported_errors() -> Iterator[Command]:
    """The one way a command fails: an error within becomes one message on standard error, and its exit code.

    Several processes of a machine report once, but for a full device, which can be the device of one process.
    """
    command = Command()
    try:
        yield command
    except HalfbyteError as error:
        message = str(error) if command.document is None else command.document.located(str(error))
        _exit(command.world, message, error.exit_code)
    except KeyboardInterrupt:
        _exit(command.world, "interrupted", INTERRUPTED)


@contextmanager
def library_imports() -> Iterator[None]:
    """For imports that take seconds: libraries stay quiet, and Ctrl-C ends the command at once.

    They stand within commands, after the recipe has been read, so a recipe with a mistake fails at once.
    """
    with ended_at_once():
        quieten_libraries()
        yield


def _exit(world: World | None, message: str, code: int) -> NoReturn:
    if world is None or world.local_rank == 0 or code == OutOfMemory.exit_code:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {message}", markup=False)
    raise typer.Exit(code)


def configure_logging(world: World) -> None:
    """Our own log from the leading process, warnings alone from everybody else's."""
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("halfbyte").setLevel(logging.INFO if world.is_leader else logging.ERROR)


def quieten_libraries() -> None:
    """Progress and notes of the libraries would stand between the lines that matter."""
    # Without a GPU bitsandbytes wants a package of kernels when diffusers imports it; nothing here computes with it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    # Imported first: Lightning sets its own levels and handlers when it is.
    import lightning.pytorch

    for name in (lightning.pytorch.__name__, "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # Lightning wraps the model for DDP on a stream of its own, and torch remarks on it at every start.
    warnings.filterwarnings("ignore", message=".*AccumulateGrad node's stream.*")
