"""Sizes of pictures that a model has no positions for, told before anything is encoded or loaded."""

import math
from collections.abc import Mapping

from halfbyte.trainer.data.buckets import Cropping
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.recipe.fields import SIDE_STEP
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.recipe.sections import DataSection


def refuse_large(recipe: Recipe, family: Family) -> None:
    """Raises RecipeError where a bucket, or a picture that is drawn, is larger than the model takes."""
    limit, data, sample = family.largest_side, recipe.data, recipe.sample
    if limit is not None and _longest(family, data) > limit:
        raise RecipeError(_resolution_problem(family, data, limit))
    if sample.prompts:
        refuse_large_drawings(family, {"sample.width": sample.width, "sample.height": sample.height})


def refuse_large_drawings(family: Family, sides: Mapping[str, int]) -> None:
    """The same of pictures that are drawn; `sides`, in pixels, by the setting or option that asks for them."""
    limit = family.largest_side
    for setting, side in sides.items():
        if limit is not None and side > limit:
            raise RecipeError(
                f"{setting}: got {side}, expected at most {limit}: {family.source.name} has no positions for longer"
                " sides"
            )


def _resolution_problem(family: Family, data: DataSection, limit: int) -> str:
    largest = _largest_resolution(family, data, limit)
    problem = (
        f"data.resolution: got {data.resolution}, expected at most {largest}: {family.source.name} takes"
    )
    if not data.aspect_buckets:
        return f"{problem} no side above {limit} pixels"
    alone = _largest_resolution(family, data.model_copy(update={"aspect_buckets": False}), limit)
    return (
        f"{problem} no side above {limit} pixels, and the longest buckets have {_longest(family, data)}; with"
        f" data.aspect_buckets=false at most {alone}"
    )


def _largest_resolution(family: Family, data: DataSection, limit: int) -> int:
    """The largest whose sizes the model takes; the smallest there is where it takes none."""
    multiple = math.lcm(family.size_multiple, SIDE_STEP)
    found = (
        resolution
        for resolution in range(limit // multiple * multiple, multiple, -multiple)
        if _longest(family, data.model_copy(update={"resolution": resolution})) <= limit
    )
    return next(found, multiple)


def _longest(family: Family, data: DataSection) -> int:
    """The longest side, in pixels, that a picture may be brought to. Raises RecipeError, see `Cropping`."""
    sizes = Cropping(data.resolution, family.size_multiple, data.aspect_buckets).sizes()
    return max(max(size) for size in sizes)
