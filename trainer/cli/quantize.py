"""`halfbyte quantize`: its options, and how it ends."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from halfbyte.trainer.cli.console import configure_logging, library_imports, reported_errors
from halfbyte.trainer.recipe.load import load_document
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
    with reported_errors() as command:
        world = read_world()
        configure_logging(world)
        settings, command.document = load_document(recipe, overrides or [], pictures_needed=samples > 0)
        with library_imports():
            from halfbyte.trainer.quantize.run import quantize, quantized_lines

        for line in quantized_lines(quantize(settings, output, samples, world, Console(soft_wrap=True))):
            typer.echo(line)


def quant_report_command(
    model: Annotated[
        Path, typer.Argument(help="A pipeline folder, or that of a transformer or text encoder.")
    ],
    component: Annotated[str, typer.Option(help="Which part of the pipeline.")] = "transformer",
    scheme: Annotated[
        str, typer.Option(help="What the skip list is for: nf4, 'nf4 mse', fp4 or int8.")
    ] = "nf4",
    threshold: Annotated[
        float | None,
        typer.Option(min=0, help="Suggest a skip list of the layers with a larger relative error, e.g. 0.1."),
    ] = None,
    sample: Annotated[
        int, typer.Option(min=0, help="Weights measured a layer, in whole rows spread evenly; 0: all.")
    ] = 4_000_000,
    worst: Annotated[int, typer.Option(min=0, help="How many of the worst layers are shown.")] = 20,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the report, of every layer, to this file.")
    ] = None,
) -> None:
    """Measure what quantization costs each layer.

    NF4, FP4, int8 and searched scales side by side, to choose quant.skip by numbers.

    Exit codes: 0 done, 2 wrong folder or option, 130 interrupted.
    """
    with reported_errors():
        with library_imports():
            from halfbyte.trainer.quantize.report_output import run_quant_report

        run_quant_report(
            model,
            component,
            beyond=None if threshold is None else (scheme, threshold),
            sample=sample,
            worst=worst,
            json_file=json_file,
            progress_console=Console(stderr=True, highlight=False, soft_wrap=True),
        )
