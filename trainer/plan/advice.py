"""Advice for a run that is out of device memory: where it failed, the planned size, and the cheapest changes."""

import shlex
from contextlib import AbstractContextManager

from halfbyte.trainer.families.family import Family
from halfbyte.trainer.plan.fit import cheapest_savings
from halfbyte.trainer.plan.planner import Planner
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.run_folder.folder import EXECUTION_SETTINGS
from halfbyte.trainer.runtime.device_memory import when_full
from halfbyte.trainer.runtime.sizes import memory_size

_CHANGES = 3


def oom_advice(recipe: Recipe, family: Family, when: str, *phases: str) -> AbstractContextManager[None]:
    """Returns a context that turns an out-of-memory error into OutOfMemory with advice, see `when_full`.

    when: completes the sentence "the device ran out of memory". phases: the names of the plan's phases that
    the work inside the context belongs to.
    """
    return when_full(lambda: out_of_memory(recipe, family, when, *phases))


def out_of_memory(recipe: Recipe, family: Family, when: str, *phases: str) -> str:
    """Returns the error message: the planned size of the largest phase, and the cheapest ways to shrink it.

    when, phases: see `oom_advice`. The planner ranks the changes.
    """
    planner = Planner(recipe, family)
    planned = sorted(map(planner.plan().phase, phases), key=lambda phase: phase.device_bytes, reverse=True)
    savings = {
        shlex.join(saving.change.settings): saving
        for phase in planned
        for saving in cheapest_savings(planner, phase.name)
    }
    changes = [
        f"{settings} (saves {memory_size(saving.saved)}; {saving.change.cost_in(saving.change.applied(recipe))})"
        for settings, saving in list(savings.items())[:_CHANGES]
    ]
    listed = ", ".join(changes) or "no known setting helps; use a larger card"
    return (
        f"the device ran out of memory {when}. The plan expects {memory_size(planned[0].device_bytes)} of device memory"
        f" for the phase {planned[0].name!r}. Cheapest changes: {listed}. To find settings for a card, such as one sold"
        f" with 8 GB, run halfbyte plan RECIPE --fit 8GB. Changing only {_resumable_settings()} lets the run continue"
        " from its last checkpoint with --resume; any other change needs a new output.dir"
    )


def _resumable_settings() -> str:
    *first, last = EXECUTION_SETTINGS
    return f"{', '.join(first)} or {last}"
