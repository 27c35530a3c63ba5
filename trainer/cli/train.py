"""The commands `halfbyte train` and `halfbyte plan`."""

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
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.runtime.signals import SIGNALS, exit_code


def train_command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, e.g. recipes/flux_mini.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to override, e.g. train.steps=10.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in output.dir from its newest checkpoint.")
    ] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Predict memory and time like `halfbyte plan`, then stop without training."
        ),
    ] = False,
    fit: Annotated[
        str | None,
        typer.Option(
            help="With --plan: choose settings that fit a card by its name, such as 8GB (8 GiB of memory);"
            " 8GiB means the same."
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Train a LoRA from a recipe.

    Exit codes: 0 done, 2 recipe or model error, 3 data error, 4 Hub error, 5 launch environment error,
    6 out of memory or disk space, 7 the export failed its self-check, 8 the loss is NaN or infinite, 9 another
    process was lost, 128 + N stopped by signal N (130: Ctrl-C), 1 an unexpected error.
    """
    if plan:
        plan_command(recipe, overrides, fit, debug=debug)
        return
    with reported_errors(debug=debug) as command:
        if fit is not None:
            raise RecipeError("--fit: chooses settings and does not train; use it together with --plan")
        with slow_imports():
            from halfbyte.trainer.recipe.load import load_document
            from halfbyte.trainer.runtime.world import leave, read_world

        world = command.world = read_world()
        command.again = "start again with --resume"
        try:
            configure_logging(world)
            settings, command.document = load_document(recipe, overrides or [])
            with library_imports():
                from halfbyte.trainer.run import run

            finished = run(
                settings, world, console=Console(quiet=not world.is_leader, soft_wrap=True), resume=resume
            )
        finally:
            leave(world)
        if not finished:
            assert SIGNALS.received is not None
            raise typer.Exit(exit_code(SIGNALS.received))


def plan_command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, e.g. recipes/flux_lora.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to override, e.g. train.batch_size=2.")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            help="Choose settings that fit a card by its name, such as 8GB (8 GiB of memory); 8GiB means the same."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Predict a run's memory by phase, its steps and its time.

    Loads no weights and needs no GPU. If the Hub does not provide the configuration files of a well-known
    model, the plan uses the configurations that the model was published with.

    Exit codes: 0 done, 2 recipe or model error, or no settings fit the card, 3 data error, 4 Hub error,
    128 + N stopped by signal N (130: Ctrl-C), 1 an unexpected error.
    """
    with reported_errors(debug=debug) as command:
        with slow_imports():
            from halfbyte.trainer.recipe.load import load_document

        settings, command.document = load_document(recipe, overrides or [], pictures_needed=False)
        with library_imports():
            from halfbyte.trainer.plan.fit import parse_budget
            from halfbyte.trainer.plan.output import show_plan

        budget = None if fit is None else parse_budget(fit)
        text, fits = show_plan(settings, budget=budget, as_json=as_json)
    typer.echo(text)
    if not fits:
        raise typer.Exit(RecipeError.exit_code)
