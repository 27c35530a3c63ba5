"""Checks that the model's table of positions covers all image sizes, before anything is encoded or loaded."""

import math
from collections.abc import Mapping

from halfbyte.trainer.data.views.buckets import Cropping
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.recipe.fields import SIDE_STEP
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.recipe.sections import DataSection


def refuse_large(recipe: Recipe, family: Family) -> None:
    """Raises RecipeError if a bucket or a sample image is larger than the model accepts."""
    limit, data, sample = family.largest_side, recipe.data, recipe.sample
    if limit is not None and _longest(family, data) > limit:
        raise RecipeError(_resolution_problem(family, data, limit))
    if sample.prompts:
        refuse_large_drawings(family, {"sample.width": sample.width, "sample.height": sample.height})


def refuse_large_drawings(family: Family, sides: Mapping[str, int]) -> None:
    """Raises RecipeError if one of `sides` (pixels, by setting or option) is larger than the model accepts."""
    limit = family.largest_side
    for setting, side in sides.items():
        if limit is not None and side > limit:
            raise RecipeError(
                f"{setting}: got {side}, expected at most {limit}, because {family.source.name} has no positions for"
                " larger images"
            )


def _resolution_problem(family: Family, data: DataSection, limit: int) -> str:
    largest = _largest_resolution(family, data, limit)
    problem = (
        f"data.resolution: got {data.resolution}, expected at most {largest}, because {family.source.name} accepts"
        f" sides of at most {limit} pixels"
    )
    if not data.aspect_buckets:
        return problem
    square = _largest_resolution(family, data.model_copy(update={"aspect_buckets": False}), limit)
    return (
        f"{problem} and the longest buckets have {_longest(family, data)}; with data.aspect_buckets=false at most"
        f" {square} is accepted"
    )


def _largest_resolution(family: Family, data: DataSection, limit: int) -> int:
    """Returns the largest resolution with sides of at most `limit`; the smallest valid one if there is none."""
    multiple = math.lcm(family.size_multiple, SIDE_STEP)
    found = (
        resolution
        for resolution in range(limit // multiple * multiple, multiple, -multiple)
        if _longest(family, data.model_copy(update={"resolution": resolution})) <= limit
    )
    return next(found, multiple)


def _longest(family: Family, data: DataSection) -> int:
    """Returns the longest side of any bucket, in pixels. Raises RecipeError for an invalid resolution."""
    sizes = Cropping(data.resolution, family.size_multiple, data.aspect_buckets).sizes()
    return max(max(size) for size in sizes)
