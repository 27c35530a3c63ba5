"""What all commands do alike: fail with one message, log, and keep the libraries quiet."""

import logging
import sys
import warnings
from typing import NoReturn

import typer
from rich.console import Console

from halfbyte.trainer.errors import HalfbyteError, OutOfMemory
from halfbyte.trainer.recipe.document import Document
from halfbyte.trainer.runtime.world import World


def fail(console: Console, world: World | None, message: str, code: int) -> NoReturn:
    """Ends the command with a message and an exit code."""
    # One message a machine: what is wrong with a recipe is wrong in every process.
    if world is None or world.local_rank == 0 or code == OutOfMemory.exit_code:
        console.print(f"error: {message}", markup=False)
    raise typer.Exit(code)


def told_where(error: HalfbyteError, written: Document | None) -> str:
    """What went wrong, with the file and line of the setting that it begins with, where a recipe has been read."""
    return str(error) if written is None else written.located(str(error))


def configure_logging(world: World) -> None:
    """Our own log from the leading process, warnings alone from everybody else's."""
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("halfbyte").setLevel(logging.INFO if world.leads else logging.ERROR)


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
