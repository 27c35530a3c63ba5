"""Shared behavior of all commands: error reports with exit codes, logging, and quiet library imports."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import typer
from rich.console import Console

from halfbyte.trainer.cli.interrupts import INTERRUPTED, exit_on_interrupt
from halfbyte.trainer.errors import HalfbyteError, OutOfMemory
from halfbyte.trainer.recipe.document import Document
from halfbyte.trainer.runtime.world import World


@dataclass
class Command:
    """Context for reporting a command's error. The command fills it in as it runs."""

    world: World | None = None
    document: Document | None = None
    """The recipe's source. With it, error messages about a setting get file and line."""


@contextmanager
def reported_errors() -> Iterator[Command]:
    """Turns an error into one message on standard error and the error's exit code.

    Every command runs inside it. Only the first process of each machine prints the message. Out of memory is
    the exception: each process that runs out prints it, because its GPU may be the only one that is full.
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
    """Wraps a command's slow imports: silences the libraries and lets Ctrl-C end the command at once.

    Commands import inside their function, after they have read the recipe, so an invalid recipe fails without
    delay.
    """
    with exit_on_interrupt():
        quieten_libraries()
        yield


def _exit(world: World | None, message: str, code: int) -> NoReturn:
    if world is None or world.local_rank == 0 or code == OutOfMemory.exit_code:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {message}", markup=False)
    raise typer.Exit(code)


def configure_logging(world: World) -> None:
    """Shows halfbyte's INFO log on rank 0 and its errors on other ranks.

    Other packages log warnings and errors.
    """
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("halfbyte").setLevel(logging.INFO if world.is_leader else logging.ERROR)


def quieten_libraries() -> None:
    """Turns off the libraries' progress bars, notes and known warnings, so a command's own output stays readable."""
    # Without a GPU, bitsandbytes complains about missing kernels when diffusers imports it. halfbyte computes
    # nothing with bitsandbytes.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    # Import Lightning before setting the levels: its import sets its own levels and handlers.
    import lightning.pytorch

    for name in (lightning.pytorch.__name__, "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # Lightning wraps the model for DDP on a separate stream, and torch warns about that at every start.
    warnings.filterwarnings("ignore", message=".*AccumulateGrad node's stream.*")
