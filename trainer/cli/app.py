"""The commands: `train RECIPE [key=value ...]`, and those of `halfbyte`."""

import gc
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from halfbyte.trainer.cli.cache_folder import DEFAULT_FOLDER, bases, clear, holdings
from halfbyte.trainer.cli.console import configure_logging, fail, quieten_libraries, told_where
from halfbyte.trainer.cli.interrupts import INTERRUPTED, ended_at_once
from halfbyte.trainer.cli.quantize import quantize_command
from halfbyte.trainer.cli.sample import sample_command
from halfbyte.trainer.errors import HalfbyteError, RecipeError
from halfbyte.trainer.recipe.document import Document
from halfbyte.trainer.recipe.recipe import json_schema_text, load_document
from halfbyte.trainer.runtime.world import World, leave, read_world

# As plain text: rich would read the [defaults] in options' descriptions as its markup, and show none of them.
app = typer.Typer(
    help="QLoRA fine-tuning of FLUX and SD3.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
train_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command("train")
@train_app.command()
def train_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe, e.g. recipes/flux_mini.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings by dotted name, e.g. train.steps=10.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in output.dir from its last checkpoint.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Tell what the run would take, as `halfbyte plan` does, and stop.")
    ] = False,
    fit: Annotated[
        str | None,
        typer.Option(help="With --plan: choose settings that fit a card of this memory, e.g. 8GB."),
    ] = None,
) -> None:
    """Train a LoRA as the recipe says.

    Exit codes: 0 done, 2 recipe or model, 3 data, 4 Hub, 5 launch environment, 6 out of memory,
    7 export that failed its check, 130 interrupted.
    """
    if plan:
        plan_command(recipe, overrides, fit)
        return
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    if fit is not None:
        fail(errors, None, "--fit: it chooses settings and trains nothing; add --plan", RecipeError.exit_code)
    world: World | None = None
    written: Document | None = None
    try:
        world = read_world()
        configure_logging(world)
        settings, written = load_document(recipe, overrides or [])
        with ended_at_once():
            quieten_libraries()
            # Slow to import, and a recipe with a mistake should be told at once.
            from halfbyte.trainer.run import run

        # Half a million objects of the libraries, which every full collection would go through again.
        gc.freeze()
        finished = run(settings, world, console=Console(quiet=not world.leads, soft_wrap=True), resume=resume)
    except HalfbyteError as error:
        fail(errors, world, told_where(error, written), error.exit_code)
    except KeyboardInterrupt:
        fail(errors, world, "interrupted", INTERRUPTED)
    finally:
        if world is not None:
            leave(world)
    if not finished:
        raise typer.Exit(INTERRUPTED)


@app.command("export")
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
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    world: World | None = None
    try:
        world = read_world()
        configure_logging(world)
        with ended_at_once():
            quieten_libraries()
            # Slow to import, as above.
            from halfbyte.trainer.adapters.formats import named_formats
            from halfbyte.trainer.export.export_lines import exported_lines
            from halfbyte.trainer.export.from_run import ExportRequest, export_run

        wanted = None if formats is None else named_formats(formats)
        request = ExportRequest(checkpoint, wanted, base, merged, text_encoder, self_check)
        for line in exported_lines(export_run(run, request, world, Console(soft_wrap=True))):
            typer.echo(line)
    except HalfbyteError as error:
        fail(errors, world, str(error), error.exit_code)
    except KeyboardInterrupt:
        fail(errors, world, "interrupted", INTERRUPTED)


@app.command("push")
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
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        with ended_at_once():
            quieten_libraries()
            # Slow to import, as above.
            from halfbyte.trainer.publish.push import PushRequest, listing, prepare_push, push

        ready = prepare_push(PushRequest(run, repo, private, checkpoint, base))
        if dry_run:
            for line in listing(ready):
                typer.echo(line)
        else:
            push(ready, Console(soft_wrap=True))
    except HalfbyteError as error:
        fail(errors, None, str(error), error.exit_code)
    except KeyboardInterrupt:
        fail(errors, None, "interrupted", INTERRUPTED)


@app.command("plan")
def plan_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe, e.g. recipes/flux_lora.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings by dotted name, e.g. train.batch_size=2.")
    ] = None,
    fit: Annotated[
        str | None, typer.Option(help="Choose settings that fit a card of this memory, e.g. 8GB.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Tell what a run will take: memory by phase, steps, time.

    Nothing is loaded and no GPU is needed. Where the Hub gives no configurations of a well-known model, those are
    planned that it was published with.

    Exit codes: 0 done, 2 recipe or model, or nothing fits the card, 3 data, 4 Hub, 130 interrupted.
    """
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    written: Document | None = None
    try:
        settings, written = load_document(recipe, overrides or [], pictures_needed=False)
        with ended_at_once():
            quieten_libraries()
            # Slow to import, as above.
            from halfbyte.trainer.plan.fit import parse_budget
            from halfbyte.trainer.plan.output import show_plan

        budget = None if fit is None else parse_budget(fit)
        text, fits = show_plan(settings, budget=budget, as_json=as_json)
    except HalfbyteError as error:
        fail(errors, None, told_where(error, written), error.exit_code)
    except KeyboardInterrupt:
        fail(errors, None, "interrupted", INTERRUPTED)
    typer.echo(text)
    if not fits:
        raise typer.Exit(RecipeError.exit_code)


@app.command("schema")
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
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            errors = Console(stderr=True, highlight=False, soft_wrap=True)
            fail(errors, None, f"{output}: cannot be written: {error.strerror}", RecipeError.exit_code)


@app.command("cache")
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
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    root = folder.expanduser()
    try:
        for kind in clear_kinds or []:
            typer.echo(f"deleted {kind}: {clear(root, kind).nbytes / 1e9:.1f} GB")
    except HalfbyteError as error:
        fail(errors, None, str(error), error.exit_code)
    typer.echo(str(root))
    for holding in holdings(root):
        typer.echo(f"  {holding.kind:8} {holding.files:7} files {holding.nbytes / 1e9:8.1f} GB")
    for line in bases(root):
        typer.echo(f"  {line}")


@app.command("quant-report")
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
    progress_console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        with ended_at_once():
            quieten_libraries()
            # Slow to import, as above.
            from halfbyte.trainer.quantize.report_output import run_quant_report

        run_quant_report(
            model,
            component,
            beyond=None if threshold is None else (scheme, threshold),
            sample=sample,
            worst=worst,
            json_file=json_file,
            progress_console=progress_console,
        )
    except HalfbyteError as error:
        fail(progress_console, None, str(error), error.exit_code)
    except KeyboardInterrupt:
        fail(progress_console, None, "interrupted", INTERRUPTED)


app.command("sample")(sample_command)
app.command("quantize")(quantize_command)
