"""Command-line applications: registers every command of `halfbyte`, and the standalone `train`."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.quant.files.atomic import write_file
from halfbyte.trainer.cli.cache_folder import bases, clear, holdings
from halfbyte.trainer.cli.console import DebugOption, reported_errors, slow_imports
from halfbyte.trainer.cli.data import data_command
from halfbyte.trainer.cli.export import export_command, push_command
from halfbyte.trainer.cli.quantize import quant_report_command, quantize_command
from halfbyte.trainer.cli.sample import sample_command
from halfbyte.trainer.cli.train import plan_command, train_command
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.recipe.fields import DEFAULT_FOLDER
from halfbyte.trainer.runtime.sizes import file_size

# Plain text: rich would treat the [defaults] in the option help as markup and hide them.
app = typer.Typer(
    help="QLoRA fine-tuning of FLUX and SD3.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
train_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def schema_command(
    output: Annotated[
        Path | None, typer.Argument(help="The file to write. Without it, the schema is printed.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Write the JSON Schema of recipes for use in an editor.

    Editors use the schema to complete settings and to check recipes.

    Exit codes: 0 done, 2 the file cannot be written.
    """
    with reported_errors(debug=debug):
        with slow_imports():
            from halfbyte.trainer.recipe.schema import json_schema_text

        text = json_schema_text()
        if output is None:
            typer.echo(text, nl=False)
        else:
            try:
                write_file(output, text)
            except OSError as error:
                raise RecipeError(f"{output}: cannot write the schema: {error.strerror}") from error


def cache_command(
    folder: Annotated[
        Path, typer.Option(help="The cache folder, as set by data.cache_dir in a recipe.")
    ] = DEFAULT_FOLDER,
    clear_kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--clear",
            help="Delete all entries of one kind: latents, masks, texts, bases or digests. Can be repeated.",
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """List the cached files and their sizes, or delete them.

    The next run that needs a deleted entry creates it again.

    Exit codes: 0 done, 2 unknown kind, or entries that cannot be deleted.
    """
    root = folder.expanduser()
    with reported_errors(debug=debug):
        for kind in clear_kinds or []:
            typer.echo(f"deleted {kind}: {file_size(clear(root, kind).nbytes)}")
    typer.echo(str(root))
    for holding in holdings(root):
        typer.echo(f"  {holding.kind:8} {holding.files:7} files {file_size(holding.nbytes):>11}")
    for line in bases(root):
        typer.echo(f"  {line}")


train_app.command()(train_command)
app.command("train")(train_command)
app.command("export")(export_command)
app.command("push")(push_command)
app.command("plan")(plan_command)
app.command("data")(data_command)
app.command("schema")(schema_command)
app.command("cache")(cache_command)
app.command("quant-report")(quant_report_command)
app.command("sample")(sample_command)
app.command("quantize")(quantize_command)
