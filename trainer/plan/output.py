"""A plan as lines to read and as JSON."""

import json
import math
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from halfbyte.trainer.plan.fit import CARDS, FittedRecipe, fit_to_budget, open_planner, smallest_card
from halfbyte.trainer.plan.phases import (
    BUS_RATE,
    CONTEXT_BYTES,
    MEASURED_ON,
    MEASURED_RATE,
    PROCESS_BYTES,
    SLACK,
    RunPlan,
    Work,
)
from halfbyte.trainer.plan.planner import Planner
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.sizes import GIB, MIB


def show_plan(recipe: Recipe, *, budget: int | None, as_json: bool) -> tuple[str, bool]:
    """The plan of a recipe, fitted to `budget` bytes if there is one; and whether it fits.

    Raises RecipeError, DataError, or HubError where the model is none whose shapes are known here.
    """
    with tempfile.TemporaryDirectory() as published:
        return _shown(open_planner(recipe, Path(published)), budget=budget, as_json=as_json)


def _shown(planner: Planner, *, budget: int | None, as_json: bool) -> tuple[str, bool]:
    if budget is None:
        plan = planner.plan()
        return (_json(plan, None) if as_json else "\n".join(plan_lines(plan))), True
    fitted = fit_to_budget(planner, budget)
    shown = fitted.nearest or fitted
    if as_json:
        return _json(shown.plan, fitted), fitted.fits
    return "\n".join([*fit_lines(fitted), "", *plan_lines(shown.plan)]), fitted.fits


def plan_lines(plan: RunPlan) -> Iterator[str]:
    """The phases with their parts, then steps and time."""
    yield f"{'':38}{'device':>10}{'host':>10}"
    for phase in plan.phases:
        yield f"{phase.name:38}{_gib(phase.device_bytes):>10}{_gib(phase.host_bytes):>10}"
        for part in _parts(phase.device):
            yield f"  {part:36}{_gib(phase.device[part]):>10}"
        for part in _parts(phase.host):
            yield f"  {part:36}{'':10}{_gib(phase.host[part]):>10}"
    yield (
        f"each phase also counts {CONTEXT_BYTES // MIB} MiB of the device for its context and {100 * SLACK:.0f} % for"
        f" gaps, both assumed, and {PROCESS_BYTES // MIB} MiB of the host for the process"
    )
    yield f"largest: {plan.largest.name}, {_needed(plan)}; {_card(plan)}"
    width, height = plan.size
    pictures = "" if plan.pictures is None else f", {plan.pictures} pictures {_times(plan)} each"
    yield f"{plan.steps} steps at up to {width}x{height}{pictures}"
    yield from _time_lines(plan)
    yield from plan.notes


def _time_lines(plan: RunPlan) -> Iterator[str]:
    work = plan.step
    step, whole = plan.seconds(MEASURED_RATE)
    slower = [f"{work.calls} operations where its processor"] if work.calls else []
    slower += [f"{_gib(work.copies)} over the bus at {BUS_RATE} GB/s where that"] if work.copies else []
    longer = f", or {' or '.join(slower)} took longer" if slower else ""
    drawn = f" with {plan.draws} drawn pictures" if plan.draws else ""
    yield (
        f"an estimate: {step:.2f} s a step, {_duration(whole)} for all steps{drawn}, from {work.flops / 1e12:.0f} TFLOP"
        f" a step at the {MEASURED_RATE:.0f} TFLOP/s that {MEASURED_ON} reached{longer}; other machines differ"
    )
    yield "left out: encoding, loading and quantizing, validation, checkpoints and the export"
    if work.copies:
        yield (
            f"{_gib(work.copies)} of packed blocks and activations come to the device a step, beside its work: at least"
            f" {Work(copies=work.copies).seconds(MEASURED_RATE):.2f} s at {BUS_RATE} GB/s, about what PCIe 4.0 gives at"
            " full width"
        )


def fit_lines(fitted: FittedRecipe) -> Iterator[str]:
    """What was changed and what each change costs, or what the recipe needs at least."""
    card = f"{fitted.budget / GIB:g} GB"
    shown = fitted.nearest or fitted
    if fitted.fits:
        yield f"fits {card} with:" if fitted.changes else f"fits {card} as it is"
    else:
        needs = (
            f"does not fit {card}: {fitted.plan.largest.name} needs {_needed(fitted.plan)} with all changes"
        )
        if fitted.nearest is None:
            yield f"{needs} that are known, and no card has that; nearest to one:"
        elif shown.changes:
            yield f"{needs} that are known; the nearest that does is a card of {shown.budget / GIB:g} GB, with:"
        else:
            yield f"{needs} that are known; the nearest that does is a card of {shown.budget / GIB:g} GB, as it is"
    for change in shown.changes:
        yield f"  {shlex.join(change.settings)}  ({change.cost_in(shown.recipe)})"


def _needed(plan: RunPlan) -> str:
    """What the plan needs of a card, rounded up: that much is enough."""
    return f"{math.ceil(10 * plan.largest.device_bytes / GIB) / 10:.1f} GB"


def _card(plan: RunPlan) -> str:
    card = smallest_card(plan)
    if card is None:
        return f"fits no card there is, the largest has {CARDS[-1]} GB; --fit finds settings that fit one"
    return f"fits {card} GB"


def _parts(parts: Mapping[str, int]) -> list[str]:
    return [part for part, nbytes in parts.items() if nbytes >= MIB]


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GB"


def _times(plan: RunPlan) -> str:
    assert plan.pictures
    times = plan.seen / plan.pictures
    return f"{times:.1f} times" if times < 10 else f"{times:.0f} times"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _json(plan: RunPlan, fitted: FittedRecipe | None) -> str:
    step, whole = plan.seconds(MEASURED_RATE)
    content: dict[str, Any] = {
        "phases": [
            {
                "name": phase.name,
                "device_bytes": phase.device_bytes,
                "allocated_bytes": phase.allocated,
                "host_bytes": phase.host_bytes,
                "device": dict(phase.device),
                "host": dict(phase.host),
            }
            for phase in plan.phases
        ],
        "largest": plan.largest.name,
        "device_bytes": plan.largest.device_bytes,
        "fits_card": _named(smallest_card(plan)),
        "size": plan.size,
        "steps": plan.steps,
        "pictures": plan.pictures,
        "pictures_seen": plan.seen,
        "step_flops": plan.step.flops,
        "step_calls": plan.step.calls,
        "step_copies_bytes": plan.step.copies,
        "seconds_a_step": step,
        "seconds": whole,
        "rate_tflops": MEASURED_RATE,
        "notes": list(plan.notes),
    }
    if fitted is not None:
        shown = fitted.nearest or fitted
        content["fit"] = {
            "budget_bytes": fitted.budget,
            "fits": fitted.fits,
            "nearest_card": None if fitted.fits else _named(smallest_card(shown.plan)),
            "changes": [
                {"settings": change.settings, "cost": change.cost_in(shown.recipe)}
                for change in shown.changes
            ],
        }
    return json.dumps(content, indent=2)


def _named(card: int | None) -> str | None:
    return None if card is None else f"{card} GB"
