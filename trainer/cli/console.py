"""Shared behavior of all commands: error reports with exit codes, logging, and quiet library imports."""

import gc
import io
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, NoReturn

import click
import typer
from rich.console import Console

from halfbyte.trainer.cli.interrupts import INTERRUPTED, exit_on_interrupt
from halfbyte.trainer.errors import DiskError, HalfbyteError, OutOfMemory, ProcessLost
from halfbyte.trainer.recipe.document import Document
from halfbyte.trainer.runtime import library_variables  # noqa: F401, before torch is imported
from halfbyte.trainer.runtime.disk import disk_fault
from halfbyte.trainer.runtime.signals import SIGNALS, Stopped, describe, exit_code
from halfbyte.trainer.wording import printable

if TYPE_CHECKING:  # torch takes seconds to import, and `halfbyte --help` does not need it
    from halfbyte.trainer.runtime.world import World

log = logging.getLogger(__name__)


@dataclass
class Command:
    """Context for reporting a command's error. The command fills it in as it runs."""

    world: "World | None" = None
    document: Document | None = None
    """The recipe's source. With it, error messages about a setting get file and line."""
    again: str = "repeat the command"
    """Completes the advice after an error of the disk: "free space, then …"."""


DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
"""The option of every command that `reported_errors` takes."""


@contextmanager
def reported_errors(*, debug: bool = False) -> Iterator[Command]:
    """Turns an error into one message on standard error and the error's exit code.

    debug: also prints the traceback.

    Every command runs inside it. Only the first process of each machine prints the message, with two
    exceptions: each process that runs out of memory prints it, because its GPU may be the only one that is full,
    and the loss of a process is printed by the lowest rank that is left.
    """
    command = Command()
    _escape_unprintable()
    threading.excepthook = partial(_report_thread, debug=debug)
    with SIGNALS.installed():
        try:
            yield command
        except (typer.Exit, click.ClickException):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                traceback.print_exc()
            _exit(command.world, *_message_and_code(error, command))


@contextmanager
def slow_imports() -> Iterator[None]:
    """Wraps imports inside a command, of torch for example: Ctrl-C ends the command at once.

    Garbage is not collected meanwhile, and what was imported is exempt from every later collection: Python would
    walk through the libraries' half a million objects again and again, a fifth of the time of the imports.
    """
    with exit_on_interrupt():
        before = len(sys.modules)
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if len(sys.modules) > before:
                gc.freeze()
            if collects:
                gc.enable()


@contextmanager
def library_imports() -> Iterator[None]:
    """Wraps a command's slowest imports, like `slow_imports`, and silences the libraries.

    Commands import inside their function, after they have read the recipe, so an invalid recipe fails without
    delay.
    """
    with slow_imports():
        quieten_libraries()
        yield


def _exit(world: "World | None", message: str, code: int) -> NoReturn:
    if code == ProcessLost.exit_code:
        from halfbyte.trainer.runtime.world import reports_lost_process

        reports = reports_lost_process()
    else:
        reports = world is None or world.local_rank == 0 or code == OutOfMemory.exit_code
    if reports:
        shown = "\n".join(printable(line) for line in message.split("\n"))
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {shown}", markup=False)
    raise typer.Exit(code)


def _message_and_code(error: BaseException, command: Command) -> tuple[str, int]:
    if isinstance(error, HalfbyteError):
        document = command.document
        return str(error) if document is None else document.located(str(error)), error.exit_code
    if isinstance(error, Stopped):
        return describe(error.number), exit_code(error.number)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, MemoryError):
        return "the host ran out of memory", OutOfMemory.exit_code
    fault = disk_fault(error, again=command.again)
    return (_unexpected(error), HalfbyteError.exit_code) if fault is None else (fault, DiskError.exit_code)


def _report_thread(failure: threading.ExceptHookArgs, *, debug: bool) -> None:
    """Reports an error that ended a thread, such as the one that writes TensorBoard's files, in one line."""
    error = failure.exc_value
    if error is None or isinstance(error, SystemExit):
        return
    if debug:
        traceback.print_exception(error)
    log.warning("a background thread failed: %s", printable(disk_fault(error) or _unexpected(error)))


def _unexpected(error: BaseException) -> str:
    """Returns the message for an error that no part of halfbyte has foreseen."""
    first = str(error).strip().partition("\n")[0]
    return (
        f"unexpected {type(error).__name__}{f': {first}' if first else ''}. This is a fault of halfbyte: run the same"
        " command with --debug for the traceback, and report it"
    )


def _escape_unprintable() -> None:
    """Lets characters that the terminal's or pipe's encoding lacks be printed as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def configure_logging(world: "World") -> None:
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
