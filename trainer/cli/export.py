"""The commands `halfbyte export` and `halfbyte push`."""

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


def export_command(
    run: Annotated[Path, typer.Argument(help="The folder of a finished or unfinished run.")],
    checkpoint: Annotated[
        int | None, typer.Option(help="The step of the checkpoint to export. [the newest]")
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="One or more of diffusers, comfyui and kohya, separated by commas. [the recipe's output.formats]",
        ),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Also export the quantized transformer.")] = False,
    merged: Annotated[
        bool,
        typer.Option(
            "--merged", help="Also export the transformer with the adapter merged in and quantized again."
        ),
    ] = False,
    text_encoder: Annotated[
        bool, typer.Option("--text-encoder", help="Also export T5, the large text encoder, in NF4.")
    ] = False,
    self_check: Annotated[
        bool, typer.Option(help="Load the export in stock diffusers and compare its predictions with ours.")
    ] = True,
    debug: DebugOption = False,
) -> None:
    """Export an adapter for diffusers, PEFT, ComfyUI and kohya.

    The checkpoint of the run's last step is exported to adapter/, transformer/ and merged/ in the run's
    folder. Any other checkpoint is exported to the same folders in exports/step-N.

    Exit codes: 0 done, 2 run, checkpoint or option error, 6 out of memory or disk space, 7 the
    export failed its self-check, 128 + N stopped by signal N (130: Ctrl-C), 1 an unexpected error.
    """
    with reported_errors(debug=debug) as command:
        with slow_imports():
            from halfbyte.trainer.runtime.world import read_world

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
        typer.Option(help="The Hub repository, as owner/name. [the recipe's output.push_to_hub]"),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Visibility of a repository that the push creates. [the recipe's output.hub_private]",
        ),
    ] = None,
    checkpoint: Annotated[
        int | None,
        typer.Option(help="Push the export of this step, written by `halfbyte export --checkpoint`."),
    ] = None,
    base: Annotated[
        bool | None,
        typer.Option(
            "--base/--no-base",
            help="--base pushes the quantized base. --no-base pushes none and deletes an earlier push's base from the"
            " repository. [push it if it was exported, and keep one that is in the repository]",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="List the files to upload with their sizes and the files to delete, print the model card, and upload"
            " nothing.",
        ),
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Push a run to the Hub, with a model card, in one commit.

    Uploads the adapter, the quantized base, samples and the model card. Training images and local paths are
    never uploaded. A repository that does not exist is created; it is private unless --public or
    output.hub_private: false is set. To continue an interrupted push, run the command again: files that are
    already uploaded are not sent twice. The push deletes only files that an earlier push wrote and that have
    not changed since, and it keeps a model card that was written by hand.

    Exit codes: 0 done, 2 run or option error, 4 Hub error, 6 out of disk space,
    128 + N stopped by signal N (130: Ctrl-C), 1 an unexpected error.
    """
    with reported_errors(debug=debug):
        with library_imports():
            from halfbyte.trainer.publish.push import PushRequest, listing, prepare_push, push

        ready = prepare_push(PushRequest(run, repo, private, checkpoint, base))
        if dry_run:
            for line in listing(ready):
                typer.echo(line)
        else:
            push(ready, Console(soft_wrap=True))
