"""Settings that make a run fit a card: one change after the other, the cheapest first, and none that is needless."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from halfbyte.trainer.errors import HubError, RecipeError
from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.hub.download import NoSuchRevision
from halfbyte.trainer.plan.changes import RecipeChange, changes, is_accepted
from halfbyte.trainer.plan.phases import RunPlan
from halfbyte.trainer.plan.planner import Planner
from halfbyte.trainer.plan.published_configs import PUBLISHED, write_configurations
from halfbyte.trainer.pretrained.pipeline import ModelSource, resolve_configurations
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.sizes import GIB

CARDS = (4, 6, 8, 10, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)
"""Memory of the cards that are sold, in GB."""


@dataclass(frozen=True)
class FittedRecipe:
    """What became of a recipe that was to fit."""

    recipe: Recipe
    plan: RunPlan
    changes: Sequence[RecipeChange]
    budget: int  # bytes
    fits: bool
    nearest: "FittedRecipe | None" = None  # where it does not: what fits the smallest card that anything fits


@dataclass(frozen=True)
class Saving:
    """A single change of a recipe, and the bytes that a phase takes less by it."""

    change: RecipeChange
    saved: int


def parse_budget(text: str) -> int:
    """`8GB` as bytes: GB as cards are named, 2**30 bytes. Raises RecipeError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:gb|gib|g)\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise RecipeError(f"--fit: got {text!r}, expected a card's memory such as 8GB")
    return int(float(found[1]) * GIB)


def smallest_card(plan: RunPlan) -> int | None:
    """The smallest card that the plan fits, in GB; None where there is none."""
    return next((card for card in CARDS if card * GIB >= plan.largest.device_bytes), None)


def fit_to_budget(planner: Planner, budget: int) -> FittedRecipe:
    """Changes the planner's recipe until every phase fits `budget` bytes, or nothing is left to change."""
    found = _as_small_as_needed(planner, budget)
    if found.fits:
        return found
    card = smallest_card(found.plan)
    return found if card is None else replace(found, nearest=_as_small_as_needed(planner, card * GIB))


def cheapest_savings(planner: Planner, phase: str = "step", count: int = 3) -> list[Saving]:
    """The cheapest single changes of the recipe that make a phase of its plan smaller."""
    recipe = planner.recipe
    before = _taken(planner, recipe, phase)
    found: list[Saving] = []
    for change in changes(planner, recipe, phase):
        saved = before - _taken(planner, change.applied(recipe), phase)
        if saved > 0:
            found.append(Saving(change, saved))
        if len(found) == count:
            break
    return found


def _taken(planner: Planner, recipe: Recipe, phase: str) -> int:
    """Bytes that tensors take in a phase."""
    if phase == "step":
        return planner.training_bytes(recipe)
    return planner.plan(recipe).phase(phase).allocated


def _as_small_as_needed(planner: Planner, budget: int) -> FittedRecipe:
    made: list[RecipeChange] = []
    recipe, plan = planner.recipe, planner.plan()
    while plan.largest.device_bytes > budget:
        change = _next(planner, recipe, plan.largest.name)
        if change is None:
            return FittedRecipe(recipe, plan, _seen(planner.recipe, made), budget, fits=False)
        made.append(change)
        recipe = change.applied(recipe)
        plan = planner.plan(recipe)
    made = _without_needless(planner, made, budget)
    recipe = _applied(planner.recipe, made)
    return FittedRecipe(recipe, planner.plan(recipe), _seen(planner.recipe, made), budget, fits=True)


def _next(planner: Planner, recipe: Recipe, phase: str) -> RecipeChange | None:
    """The cheapest change that makes the phase smaller."""
    before = _taken(planner, recipe, phase)
    for change in changes(planner, recipe, phase):
        if _taken(planner, change.applied(recipe), phase) < before:
            return change
    return None


def _without_needless(planner: Planner, made: list[RecipeChange], budget: int) -> list[RecipeChange]:
    """The changes without those that later ones made needless; of two that serve, the costlier one goes."""
    needed = list(made)
    for change in reversed(made):
        others = [other for other in needed if other is not change]
        recipe = _applied(planner.recipe, others)
        if is_accepted(recipe) and planner.fits(recipe, budget):
            needed = others
    return needed


def _applied(recipe: Recipe, made: Sequence[RecipeChange]) -> Recipe:
    for change in made:
        recipe = change.applied(recipe)
    return recipe


def _seen(before: Recipe, made: Sequence[RecipeChange]) -> list[RecipeChange]:
    """The changes with the settings alone that differ in the end, each once."""
    after = _applied(before, made)
    seen: list[RecipeChange] = []
    told: set[tuple[str, str | None]] = set()
    for change in reversed(made):
        settings = [
            setting
            for setting in change.made
            if (setting.section, setting.field) not in told
            and setting.is_in(after)
            and not setting.is_in(before)
        ]
        told |= {(setting.section, setting.field) for setting in settings}
        if settings:
            seen.insert(0, RecipeChange(settings, change.cost))
    return seen


def open_planner(recipe: Recipe, published: Path | None = None) -> Planner:
    """The planner of a recipe. Raises RecipeError or HubError, see `source.resolve_configurations`.

    published: an empty folder, for the shapes of a published model where the Hub gives no configurations of it; it
    must stay for as long as the planner is used. None: that is an error.
    """
    model, family_class = recipe.model, FAMILIES[recipe.model.family]
    components = family_class.components(own_t5=model.text_encoder is not None)
    denoiser = family_class.denoiser_class.__name__
    notes: tuple[str, ...] = ()
    try:
        source = resolve_configurations(model.path, model.revision, components, denoiser)
    except NoSuchRevision:
        raise
    except HubError as error:
        if published is None or model.path not in PUBLISHED:
            raise
        source = ModelSource(model.path, write_configurations(published, model.path), None)
        source.require_class(denoiser)
        notes = (f"planned from the shapes that {model.path} was published with; the Hub gave none: {error}",)
    family = family_class(source, model.max_sequence_length)
    for named, take in (
        (model.transformer, family.take_transformer),
        (model.text_encoder, family.take_text_encoder),
    ):
        try:
            if named is not None:
                take(named)
        except HubError as error:
            if not notes or isinstance(error, NoSuchRevision):
                raise
            notes = (*notes, f"planned with the pipeline's own instead; {error}")
    return Planner(recipe, family, notes)
