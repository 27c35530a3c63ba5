"""`halfbyte train` and `halfbyte plan`."""

import gc
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from halfbyte.trainer.cli.console import configure_logging, library_imports, reported_errors
from halfbyte.trainer.cli.interrupts import INTERRUPTED
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.recipe.load import load_document
from halfbyte.trainer.runtime.world import leave, read_world


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
    with reported_errors() as command:
        if fit is not None:
            raise RecipeError("--fit: it chooses settings and trains nothing; add --plan")
        world = command.world = read_world()
        try:
            configure_logging(world)
            settings, command.document = load_document(recipe, overrides or [])
            with library_imports():
                from halfbyte.trainer.run import run

            # Half a million objects of the libraries, which every full collection would go through again.
            gc.freeze()
            finished = run(
                settings, world, console=Console(quiet=not world.is_leader, soft_wrap=True), resume=resume
            )
        finally:
            leave(world)
    if not finished:
        raise typer.Exit(INTERRUPTED)


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
    with reported_errors() as command:
        settings, command.document = load_document(recipe, overrides or [], pictures_needed=False)
        with library_imports():
            from halfbyte.trainer.plan.fit import parse_budget
            from halfbyte.trainer.plan.output import show_plan

        budget = None if fit is None else parse_budget(fit)
        text, fits = show_plan(settings, budget=budget, as_json=as_json)
    typer.echo(text)
    if not fits:
        raise typer.Exit(RecipeError.exit_code)
