"""Finds the cheapest settings with which a run fits a card.

Memory is in GiB (2^30 bytes) here and wherever a plan is printed. The only exception is the name of a card:
cards are named as shops name them, and an 8 GB card has 8 GiB of memory.
"""

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
"""Names of the cards that are sold, in GB as shops count: a card called 8 GB has 8 GiB (2^33 bytes) of
memory."""


@dataclass(frozen=True)
class FittedRecipe:
    """The result of fitting a recipe to a memory budget."""

    recipe: Recipe
    plan: RunPlan
    changes: Sequence[RecipeChange]
    budget: int  # bytes
    fits: bool
    nearest: "FittedRecipe | None" = None  # if it does not fit: fitted to the smallest card that is enough


@dataclass(frozen=True)
class Saving:
    """A single change of a recipe, and the memory that it saves in one phase."""

    change: RecipeChange
    saved: int  # bytes


def parse_budget(text: str) -> int:
    """Returns the bytes of a card's memory; `8GB` and `8GiB` are the same, 8 * 2^30 bytes.

    `8GB` is the name of the card in shops. Such a name is the only place where GB does not mean 10^9 bytes.

    Raises:
        RecipeError: `text` is not a positive number with the unit GB, GiB or G.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:gb|gib|g)\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise RecipeError(f"--fit: got {text!r}, expected a card's memory, such as 8GB or 8GiB")
    return int(float(found[1]) * GIB)


def smallest_card(plan: RunPlan) -> int | None:
    """Returns the name of the smallest card that the plan fits, one of CARDS; None if it fits none."""
    return next((card for card in CARDS if card * GIB >= plan.largest.device_bytes), None)


def describe_card(name: float) -> str:
    """Returns `an 8 GB card (8 GiB)`: the card by its name in shops, and its memory."""
    # "an" before 8, 80 to 89, 11 and 18.
    article = "an" if re.match(r"8|1[18](\.|$)", f"{name:g}") else "a"
    return f"{article} {name:g} GB card ({name:g} GiB)"


def fit_to_budget(planner: Planner, budget: int) -> FittedRecipe:
    """Changes the planner's recipe until every phase fits `budget` bytes, or no changes are left."""
    found = _as_small_as_needed(planner, budget)
    if found.fits:
        return found
    card = smallest_card(found.plan)
    return found if card is None else replace(found, nearest=_as_small_as_needed(planner, card * GIB))


def cheapest_savings(planner: Planner, phase: str = "step", count: int = 3) -> list[Saving]:
    """Returns up to `count` single changes of the recipe that shrink a phase of its plan, cheapest first."""
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
    """Returns the bytes of a phase's tensors on the device."""
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
    """Returns the cheapest change that shrinks the phase; None if there is none."""
    before = _taken(planner, recipe, phase)
    for change in changes(planner, recipe, phase):
        if _taken(planner, change.applied(recipe), phase) < before:
            return change
    return None


def _without_needless(planner: Planner, made: list[RecipeChange], budget: int) -> list[RecipeChange]:
    """Drops changes that later ones made unnecessary, the most expensive first."""
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
    """Returns the changes with only the settings that differ from `before` in the end, each setting once."""
    after = _applied(before, made)
    seen: list[RecipeChange] = []
    listed: set[tuple[str, str | None]] = set()
    # Backwards: if several changes set the same field, the last one decides its value and is the one to list.
    for change in reversed(made):
        settings = [
            setting
            for setting in change.made
            if (setting.section, setting.field) not in listed
            and setting.is_in(after)
            and not setting.is_in(before)
        ]
        listed |= {(setting.section, setting.field) for setting in settings}
        if settings:
            seen.insert(0, RecipeChange(settings, change.cost))
    return seen


def open_planner(recipe: Recipe, published: Path | None = None) -> Planner:
    """Opens the model's configurations and returns the recipe's planner.

    published: an empty folder for the built-in configurations of a published model, used if the Hub gives
    none; it must exist as long as the planner is used. None: a model that the Hub does not give is an error.

    Raises:
        RecipeError, HubError: see `pretrained.pipeline.resolve_configurations`.
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
        notes = (
            f"planned with the built-in configuration of {model.path}, because the Hub gave none: {error}",
        )
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
            notes = (*notes, f"planned with the pipeline's own component instead: {error}")
    return Planner(recipe, family, notes)
