"""The commands `halfbyte quantize` and `halfbyte quant-report`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from halfbyte.trainer.cli.console import (
    DebugOption,
    configure_logging,
    library_imports,
    reported_errors,
    slow_imports,
)


def quantize_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe. Its model, quant and data sections are used.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to override, e.g. quant.scale_search=mse.")
    ] = None,
    output: Annotated[Path, typer.Option(help="A new folder for the quantized transformer.")] = Path(
        "transformer-nf4"
    ),
    samples: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of calibration samples from the recipe's images. Weights are rounded so that each layer's"
            " output stays close to the unquantized layer's. 0 rounds each weight to the nearest code and needs no"
            " images.",
        ),
    ] = 256,
    debug: DebugOption = False,
) -> None:
    """Write a quantized transformer, calibrated on images.

    Quantizes the recipe's transformer, calibrated on the recipe's images. To train on the result, set
    model.transformer to its folder.

    Exit codes: 0 done, 2 recipe, model or folder error, 3 data error, 4 Hub error, 5 launch environment
    error, 6 out of memory or disk space,
    128 + N stopped by signal N (130: Ctrl-C), 1 an unexpected error.
    """
    with reported_errors(debug=debug) as command:
        with slow_imports():
            from halfbyte.trainer.recipe.load import load_document
            from halfbyte.trainer.runtime.world import read_world

        world = read_world()
        configure_logging(world)
        settings, command.document = load_document(recipe, overrides or [], pictures_needed=samples > 0)
        with library_imports():
            from halfbyte.trainer.quantize.run import quantize, quantized_lines

        for line in quantized_lines(quantize(settings, output, samples, world, Console(soft_wrap=True))):
            typer.echo(line)


def quant_report_command(
    model: Annotated[Path, typer.Argument(help="The folder of a pipeline, a transformer or a text encoder.")],
    component: Annotated[str, typer.Option(help="The part of the pipeline to measure.")] = "transformer",
    scheme: Annotated[
        str, typer.Option(help="The quantization to suggest a skip list for: nf4, 'nf4 mse', fp4 or int8.")
    ] = "nf4",
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Suggest a skip list: the layers whose relative error is larger than this, e.g. 0.1.",
        ),
    ] = None,
    sample: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of weights to measure per layer, as whole rows spread evenly. 0 measures all weights.",
        ),
    ] = 4_000_000,
    worst: Annotated[int, typer.Option(min=0, help="How many of the worst layers to show.")] = 20,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Also write the report to this file, with every layer."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Measure the quantization error of each layer.

    Compares NF4, FP4, int8 and searched scales, so you can choose quant.skip from measured errors.

    Exit codes: 0 done, 2 folder or option error,
    128 + N stopped by signal N (130: Ctrl-C), 1 an unexpected error.
    """
    with reported_errors(debug=debug):
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
