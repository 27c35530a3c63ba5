"""What is said when the device is full: where it happened, what was planned, and the cheapest changes."""

import shlex
from contextlib import AbstractContextManager

from halfbyte.trainer.families.family import Family
from halfbyte.trainer.plan.fit import cheapest_savings
from halfbyte.trainer.plan.planner import Planner
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.run_folder.folder import HOW_IT_IS_COMPUTED
from halfbyte.trainer.runtime.device_memory import when_full
from halfbyte.trainer.runtime.sizes import GIB

_CHANGES = 3


def oom_advice(recipe: Recipe, family: Family, when: str, *phases: str) -> AbstractContextManager[None]:
    """`when_full` with what would help.

    when: what stands behind "the device ran out of memory". phases: of the plan, that the work within belongs to.
    """
    return when_full(lambda: out_of_memory(recipe, family, when, *phases))


def out_of_memory(recipe: Recipe, family: Family, when: str, *phases: str) -> str:
    """One message: the largest of the phases as it is planned, and what makes them smaller, as the plan ranks it."""
    planner = Planner(recipe, family)
    planned = sorted(map(planner.plan().phase, phases), key=lambda phase: phase.device_bytes, reverse=True)
    savings = {
        shlex.join(saving.change.settings): saving
        for phase in planned
        for saving in cheapest_savings(planner, phase.name)
    }
    changes = [
        f"{settings} ({saving.saved / GIB:.1f} GB less; {saving.change.cost_in(saving.change.applied(recipe))})"
        for settings, saving in list(savings.items())[:_CHANGES]
    ]
    listed = ", ".join(changes) or "none that is known here; a larger card"
    return (
        f"the device ran out of memory {when}. Planned are {planned[0].device_bytes / GIB:.1f} GB of the card"
        f" ({planned[0].name}). The cheapest changes: {listed}; halfbyte plan RECIPE --fit 8GB finds settings for a"
        f" card. With a checkpoint a run goes on (--resume) if it is {_how()} that changes, and needs a new output.dir"
        " otherwise"
    )


def _how() -> str:
    *first, last = HOW_IT_IS_COMPUTED
    return f"{', '.join(first)} or {last}"
