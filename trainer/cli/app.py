"""The commands: `train RECIPE [key=value ...]`, and those of `halfbyte`."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.quant.files.atomic import write_file
from halfbyte.trainer.cli.cache_folder import bases, clear, holdings
from halfbyte.trainer.cli.console import reported_errors
from halfbyte.trainer.cli.export import export_command, push_command
from halfbyte.trainer.cli.quantize import quant_report_command, quantize_command
from halfbyte.trainer.cli.sample import sample_command
from halfbyte.trainer.cli.train import plan_command, train_command
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.recipe.fields import DEFAULT_FOLDER
from halfbyte.trainer.recipe.schema import json_schema_text
from halfbyte.trainer.runtime.sizes import file_size

# As plain text: rich would read the [defaults] in options' descriptions as its markup, and show none of them.
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
        Path | None, typer.Argument(help="A file to write; without it the schema is printed.")
    ] = None,
) -> None:
    """Write the recipe's JSON Schema, for editors.

    They complete and check recipes with it.

    Exit codes: 0 done, 2 a file that cannot be written.
    """
    text = json_schema_text()
    if output is None:
        typer.echo(text, nl=False)
    else:
        with reported_errors():
            try:
                write_file(output, text)
            except OSError as error:
                raise RecipeError(f"{output}: cannot be written: {error.strerror}") from error


def cache_command(
    folder: Annotated[
        Path, typer.Option(help="The recipe's data.cache_dir; without it the default one.")
    ] = DEFAULT_FOLDER,
    clear_kinds: Annotated[
        list[str] | None,
        typer.Option("--clear", help="Delete all of a kind: latents, texts, bases or digests."),
    ] = None,
) -> None:
    """List what is kept between runs and its size, or delete it.

    What is deleted the next run makes again.

    Exit codes: 0 done, 2 a kind that there is not.
    """
    root = folder.expanduser()
    with reported_errors():
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
app.command("schema")(schema_command)
app.command("cache")(cache_command)
app.command("quant-report")(quant_report_command)
app.command("sample")(sample_command)
app.command("quantize")(quantize_command)
