"""Formats a plan as text and as JSON.

The text gives memory in GiB (2^30 bytes). Only the names of cards are in GB, as shops name them.
"""

import json
import math
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from halfbyte.trainer.plan.fit import (
    CARDS,
    FittedRecipe,
    describe_card,
    fit_to_budget,
    open_planner,
    smallest_card,
)
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
from halfbyte.trainer.runtime.sizes import GIB, MIB, memory_size


def show_plan(recipe: Recipe, *, budget: int | None, as_json: bool) -> tuple[str, bool]:
    """Returns the text or JSON of a recipe's plan, and True if it fits.

    budget: bytes of device memory to fit the recipe to first; None for no limit.

    Raises:
        RecipeError, DataError: the recipe or its images are not valid.
        HubError: the Hub does not give the model's configurations, and they are not built in either.
    """
    with tempfile.TemporaryDirectory() as published:
        return _formatted(open_planner(recipe, Path(published)), budget=budget, as_json=as_json)


def _formatted(planner: Planner, *, budget: int | None, as_json: bool) -> tuple[str, bool]:
    if budget is None:
        plan = planner.plan()
        return (_json(plan, None) if as_json else "\n".join(plan_lines(plan))), True
    fitted = fit_to_budget(planner, budget)
    shown = fitted.nearest or fitted
    if as_json:
        return _json(shown.plan, fitted), fitted.fits
    return "\n".join([*fit_lines(fitted), "", *plan_lines(shown.plan)]), fitted.fits


def plan_lines(plan: RunPlan) -> Iterator[str]:
    """Yields the phases with their parts, then the card, the steps and the time."""
    yield f"{'':38}{'device':>12}{'host':>12}"
    for phase in plan.phases:
        yield f"{phase.name:38}{memory_size(phase.device_bytes):>12}{memory_size(phase.host_bytes):>12}"
        for part in _parts(phase.device):
            yield f"  {part:36}{memory_size(phase.device[part]):>12}"
        for part in _parts(phase.host):
            yield f"  {part:36}{'':12}{memory_size(phase.host[part]):>12}"
    yield (
        f"each phase includes {memory_size(CONTEXT_BYTES)} of device memory for the CUDA context and"
        f" {100 * SLACK:.0f} % for the allocator's gaps, both assumed, and {memory_size(PROCESS_BYTES)} of host memory"
        " for the process"
    )
    yield f"largest: {plan.largest.name}, {_needed(plan)}; {_card(plan)}"
    width, height = plan.size
    pictures = "" if plan.pictures is None else f", {plan.pictures} images, {_times(plan)}"
    texts = "" if plan.texts is None else f", {plan.texts} captions to encode"
    yield f"{plan.steps} steps at up to {width}x{height}{pictures}{texts}"
    yield from _time_lines(plan)
    yield from plan.notes


def _time_lines(plan: RunPlan) -> Iterator[str]:
    work = plan.step
    step, whole = plan.seconds(MEASURED_RATE)
    limits = [f"{work.flops / 1e12:.0f} TFLOP at the {MEASURED_RATE:.0f} TFLOP/s that {MEASURED_ON} reached"]
    limits += [f"{work.calls} operations that its CPU launches"] if work.calls else []
    limits += [f"{memory_size(work.copies)} over the bus at {BUS_RATE} GiB/s"] if work.copies else []
    slowest = limits[0] if len(limits) == 1 else f"the slowest of {', '.join(limits)}"
    drawn = f" and {plan.draws} sample images" if plan.draws else ""
    yield (
        f"estimated time: {step:.2f} s per step, {_duration(whole)} for all steps{drawn}; a step takes {slowest}; other"
        " machines differ"
    )
    yield "not included: encoding, loading and quantizing, validation, checkpoints and export"
    if work.copies:
        yield (
            f"each step copies {memory_size(work.copies)} of packed blocks and activations to the device while it"
            f" computes: at least {Work(copies=work.copies).seconds(MEASURED_RATE):.2f} s at {BUS_RATE} GiB/s, about"
            " what a full-width PCIe 4.0 bus gives"
        )


def fit_lines(fitted: FittedRecipe) -> Iterator[str]:
    """Yields the changes and their costs; if the recipe does not fit, the smallest card that is enough."""
    card = describe_card(fitted.budget / GIB)
    shown = fitted.nearest or fitted
    if fitted.fits:
        yield f"fits {card} with these changes:" if fitted.changes else f"fits {card} unchanged"
    else:
        needs = (
            f"does not fit {card}: with every known change, {fitted.plan.largest.name} still needs"
            f" {_needed(fitted.plan)}"
        )
        if fitted.nearest is None:
            yield f"{needs}, and no card has that much; the smallest recipe has these changes:"
        elif shown.changes:
            yield f"{needs}; it fits {describe_card(shown.budget / GIB)} with these changes:"
        else:
            yield f"{needs}; it fits {describe_card(shown.budget / GIB)} unchanged"
    for change in shown.changes:
        yield f"  {shlex.join(change.settings)}  ({change.cost_in(shown.recipe)})"


def _needed(plan: RunPlan) -> str:
    """Returns the device memory that the plan needs, rounded up so that this much is enough."""
    return f"{math.ceil(10 * plan.largest.device_bytes / GIB) / 10:.1f} GiB"


def _card(plan: RunPlan) -> str:
    card = smallest_card(plan)
    if card is None:
        return (
            f"fits no card, the largest is {describe_card(CARDS[-1])}; --fit finds settings that fit a card"
        )
    return f"fits {describe_card(card)}"


def _parts(parts: Mapping[str, int]) -> list[str]:
    return [part for part, nbytes in parts.items() if nbytes >= MIB]


def _times(plan: RunPlan) -> str:
    assert plan.epoch
    times = plan.seen / plan.epoch
    number = f"{times:.1f}" if times < 10 else f"{times:.0f}"
    if plan.epoch == plan.pictures:
        return f"{number} times each"
    return f"{number} epochs of {plan.epoch} samples"


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
        "fits_card": _card_name(smallest_card(plan)),
        "size": plan.size,
        "steps": plan.steps,
        "pictures": plan.pictures,
        "captions": plan.texts,
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
            "nearest_card": None if fitted.fits else _card_name(smallest_card(shown.plan)),
            "changes": [
                {"settings": change.settings, "cost": change.cost_in(shown.recipe)}
                for change in shown.changes
            ],
        }
    return json.dumps(content, indent=2)


def _card_name(card: int | None) -> str | None:
    """Returns the name of a card in shops, such as `8 GB`."""
    return None if card is None else f"{card} GB"
