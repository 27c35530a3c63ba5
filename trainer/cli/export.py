"""`halfbyte export` and `halfbyte push`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from halfbyte.trainer.cli.console import configure_logging, library_imports, reported_errors
from halfbyte.trainer.runtime.world import read_world


def export_command(
    run: Annotated[Path, typer.Argument(help="The folder of a run, finished or not.")],
    checkpoint: Annotated[
        int | None, typer.Option(help="Export the checkpoint of this step; without it the newest.")
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            "--format", help="Of diffusers, comfyui and kohya, with commas; without it as the recipe says."
        ),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Also the quantized transformer.")] = False,
    merged: Annotated[
        bool,
        typer.Option("--merged", help="Also the transformer with the adapter merged in, quantized again."),
    ] = False,
    text_encoder: Annotated[
        bool, typer.Option("--text-encoder", help="Also T5, the large text encoder, in NF4.")
    ] = False,
    self_check: Annotated[
        bool, typer.Option(help="Have stock diffusers load the export and compare predictions.")
    ] = True,
) -> None:
    """Export a run's adapter, for diffusers, PEFT, ComfyUI, kohya.

    The checkpoint of a run's last step goes to adapter/, transformer/ and merged/ in the run's folder, any other to
    the same folders below exports/step-N.

    Exit codes: 0 done, 2 run, checkpoint or option, 6 out of memory, 7 the export failed its own check,
    130 interrupted.
    """
    with reported_errors() as command:
        world = command.world = read_world()
        configure_logging(world)
        with library_imports():
            from halfbyte.trainer.adapters.formats import named_formats
            from halfbyte.trainer.export.export import exported_lines
            from halfbyte.trainer.export.from_run import ExportRequest, export_run

        wanted = None if formats is None else named_formats(formats)
        request = ExportRequest(checkpoint, wanted, base, merged, text_encoder, self_check)
        for line in exported_lines(export_run(run, request, world, Console(soft_wrap=True))):
            typer.echo(line)


def push_command(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    repo: Annotated[
        str | None,
        typer.Option(help="The Hub repository, as owner/name; without it the recipe's output.push_to_hub."),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="How the repository is made where there is none; without it by output.hub_private.",
        ),
    ] = None,
    checkpoint: Annotated[
        int | None, typer.Option(help="Push what `halfbyte export --checkpoint` wrote of this step instead.")
    ] = None,
    base: Annotated[
        bool | None,
        typer.Option(
            "--base/--no-base",
            help="With the quantized base, or without and the one there deleted. [if exported; one there is kept]",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="List the files with their sizes and what is deleted there, print the card, and send nothing.",
        ),
    ] = False,
) -> None:
    """Push a run to the Hub, with a model card, in one commit.

    Adapter, quantized base, samples and card are sent, no training pictures and no paths of this machine. The
    repository is made, private, where there is none. A push that was interrupted goes on where it was when it is
    repeated. Of what is there, only files that an earlier push wrote and nobody has changed since are deleted, and a
    card that was written by hand is kept.

    Exit codes: 0 done, 2 run or option, 4 Hub, 130 interrupted.
    """
    with reported_errors():
        with library_imports():
            from halfbyte.trainer.publish.push import PushRequest, listing, prepare_push, push

        ready = prepare_push(PushRequest(run, repo, private, checkpoint, base))
        if dry_run:
            for line in listing(ready):
                typer.echo(line)
        else:
            push(ready, Console(soft_wrap=True))
