"""`halfbyte quantize`: its options, and how it ends."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from halfbyte.trainer.cli.console import configure_logging, fail, quieten_libraries, told_where
from halfbyte.trainer.cli.interrupts import INTERRUPTED, ended_at_once
from halfbyte.trainer.errors import HalfbyteError
from halfbyte.trainer.recipe.document import Document
from halfbyte.trainer.recipe.recipe import load_document
from halfbyte.trainer.runtime.world import read_world


def quantize_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe: its model, quant and data sections count.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings by dotted name, e.g. quant.scale_search=mse.")
    ] = None,
    output: Annotated[Path, typer.Option(help="A new folder for the transformer.")] = Path("transformer-nf4"),
    samples: Annotated[
        int,
        typer.Option(
            min=0,
            help="Calibrate on so many samples of the recipe's pictures: round weights so that what layers give comes"
            " out right. 0: round each weight to the nearest, which needs no pictures.",
        ),
    ] = 256,
) -> None:
    """Write a quantized transformer, calibrated on pictures.

    The recipe's transformer on the recipe's pictures, to train on with model.transformer.

    Exit codes: 0 done, 2 recipe, model or folder, 3 pictures, 4 Hub, 5 launch environment, 6 out of memory,
    130 interrupted.
    """
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    written: Document | None = None
    try:
        world = read_world()
        configure_logging(world)
        settings, written = load_document(recipe, overrides or [], pictures_needed=samples > 0)
        with ended_at_once():
            quieten_libraries()
            # Slow to import, and a recipe with a mistake should be told at once.
            from halfbyte.trainer.quantize.run import quantize, quantized_lines

        for line in quantized_lines(quantize(settings, output, samples, world, Console(soft_wrap=True))):
            typer.echo(line)
    except HalfbyteError as error:
        fail(errors, None, told_where(error, written), error.exit_code)
    except KeyboardInterrupt:
        fail(errors, None, "interrupted", INTERRUPTED)
