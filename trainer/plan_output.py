"""A plan as lines to read and as JSON."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from halfbyte.trainer.plan_fit import Fit, fit, open_planner, smallest_card
from halfbyte.trainer.recipe import Recipe
from halfbyte.trainer.run_plan import (
    CONTEXT_BYTES,
    GIB,
    MEASURED_ON,
    MEASURED_RATE,
    MIB,
    PROCESS_BYTES,
    SLACK,
    RunPlan,
)

_BUS = 22  # GB/s; an H200's virtual machine gave 16 to 20


def show_plan(recipe: Recipe, *, budget: int | None, as_json: bool) -> tuple[str, bool]:
    """The plan of a recipe, fitted to `budget` bytes if there is one; and whether it fits."""
    planner = open_planner(recipe)
    if budget is None:
        plan = planner.plan()
        return (_json(plan, None, None) if as_json else "\n".join(plan_lines(plan))), True
    fitted = fit(planner, budget)
    if as_json:
        return _json(fitted.plan, fitted, budget), fitted.fits
    return "\n".join([*fit_lines(fitted, budget), "", *plan_lines(fitted.plan)]), fitted.fits


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
    yield f"largest: {plan.largest.name}, {plan.largest.device_bytes / GIB:.1f} GB; fits {smallest_card(plan)}"
    width, height = plan.size
    pictures = "" if plan.pictures is None else f", {plan.pictures} pictures {_times(plan)} each"
    yield f"{plan.steps} steps at up to {width}x{height}{pictures}"
    step, whole = plan.seconds(MEASURED_RATE)
    launches = f", or {plan.step_calls} operations where its processor took longer" if plan.step_calls else ""
    yield (
        f"an estimate: {step:.2f} s a step, {_duration(whole)} in all, from {plan.step_flops / 1e12:.0f} TFLOP a step"
        f" at the {MEASURED_RATE:.0f} TFLOP/s that {MEASURED_ON} reached{launches}; other machines differ"
    )
    if plan.step_copies:
        at_least = plan.step_copies / (GIB * _BUS)
        yield (
            f"{_gib(plan.step_copies)} of packed blocks come to the device a step, beside its work: at least"
            f" {at_least:.2f} s at {_BUS} GB/s, about what PCIe 4.0 gives at full width"
        )
    yield from plan.notes


def fit_lines(fitted: Fit, budget: int) -> Iterator[str]:
    """What was changed and what each change costs, or what the recipe needs at least."""
    card = f"{budget / GIB:g} GB"
    if fitted.fits and not fitted.changes:
        yield f"fits {card} as it is"
    elif fitted.fits:
        yield f"fits {card} with:"
    else:
        yield (
            f"does not fit {card}: {fitted.plan.largest.name} needs {fitted.plan.largest.device_bytes / GIB:.1f} GB"
            f" with all changes that are known; the nearest that does is a card of {smallest_card(fitted.plan)}, with:"
        )
    for change in fitted.changes:
        yield f"  {' '.join(change.settings)}  ({change.cost})"


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


def _json(plan: RunPlan, fitted: Fit | None, budget: int | None) -> str:
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
        "fits_card": smallest_card(plan),
        "size": plan.size,
        "steps": plan.steps,
        "pictures": plan.pictures,
        "pictures_seen": plan.seen,
        "step_flops": plan.step_flops,
        "step_calls": plan.step_calls,
        "step_copies_bytes": plan.step_copies,
        "seconds_a_step": plan.seconds(MEASURED_RATE)[0],
        "seconds": plan.seconds(MEASURED_RATE)[1],
        "rate_tflops": MEASURED_RATE,
        "notes": list(plan.notes),
    }
    if fitted is not None:
        content["fit"] = {
            "budget_bytes": budget,
            "fits": fitted.fits,
            "changes": [
                {"settings": list(change.settings), "cost": change.cost} for change in fitted.changes
            ],
        }
    return json.dumps(content, indent=2)
