"""What is said when the device is full: where it happened, what was planned, and the cheapest changes."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from halfbyte.trainer.errors import OutOfMemory
from halfbyte.trainer.families.base import Family
from halfbyte.trainer.plan_fit import cheapest_savings
from halfbyte.trainer.recipe import Recipe
from halfbyte.trainer.run_plan import GIB, Planner

# cuBLAS and cuDNN say so in errors of their own.
_STATUS = "STATUS_ALLOC_FAILED"
_CHANGES = 3


@contextmanager
def when_full(message: Callable[[], str]) -> Iterator[None]:
    """Raises OutOfMemory, saying so, where torch or its libraries find no memory on the device."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or _STATUS in str(error):
            raise OutOfMemory(message()) from error
        raise


def told_when_full(recipe: Recipe, family: Family, when: str, *phases: str) -> AbstractContextManager[None]:
    """`when_full` with what would help.

    when: what stands behind "the device ran out of memory". phases: of the plan, that the work within belongs to.
    """
    return when_full(lambda: out_of_memory(recipe, family, when, *phases))


def out_of_memory(recipe: Recipe, family: Family, when: str, *phases: str) -> str:
    """One message: the largest of the phases as it is planned, and what makes them smaller, as the plan ranks it."""
    planner = Planner(recipe, family)
    planned = sorted(map(planner.plan().phase, phases), key=lambda phase: phase.device_bytes, reverse=True)
    savings = {
        shlex.join(saving.change.settings): f"{saving.saved / GIB:.1f} GB less; {saving.change.cost}"
        for phase in planned
        for saving in cheapest_savings(planner, phase.name)
    }
    changes = [f"{settings} ({saved})" for settings, saved in list(savings.items())[:_CHANGES]]
    listed = ", ".join(changes) or "none that is known here; a larger card"
    return (
        f"the device ran out of memory {when}. Planned are {planned[0].device_bytes / GIB:.1f} GB of the card"
        f" ({planned[0].name}). The cheapest changes: {listed}; halfbyte plan RECIPE --fit 8GB finds settings for a"
        " card"
    )
