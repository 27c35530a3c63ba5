"""Checks that the model's table of positions covers all image sizes, before anything is encoded or loaded."""

import math
from collections.abc import Mapping
from dataclasses import replace

from halfbyte.trainer.data.read_sets import croppings_of
from halfbyte.trainer.data.views.buckets import Cropping
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.recipe.fields import SIDE_STEP
from halfbyte.trainer.recipe.recipe import Recipe


def refuse_large(recipe: Recipe, family: Family) -> None:
    """Raises RecipeError if a resolution does not suit the model, or a bucket or sample image is too large for it."""
    limit, sample = family.largest_side, recipe.sample
    for data_set in recipe.data.resolved_sets:
        for cropping in croppings_of(data_set, family):
            if limit is not None and _longest(cropping) > limit:
                raise RecipeError(_resolution_problem(family, cropping, limit))
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


def _resolution_problem(family: Family, cropping: Cropping, limit: int) -> str:
    section = cropping.setting
    largest = _largest_resolution(cropping, limit)
    problem = (
        f"{section}.resolution: got {cropping.resolution}, expected at most {largest}, because {family.source.name}"
        f" accepts sides of at most {limit} pixels"
    )
    if not cropping.aspect_buckets:
        return problem
    square = _largest_resolution(replace(cropping, aspect_buckets=False), limit)
    return (
        f"{problem} and the longest buckets have {_longest(cropping)}; with {section}.aspect_buckets=false at most"
        f" {square} is accepted"
    )


def _largest_resolution(cropping: Cropping, limit: int) -> int:
    """Returns the largest resolution with sides of at most `limit`; the smallest valid one if there is none."""
    multiple = math.lcm(cropping.size_multiple, SIDE_STEP)
    found = (
        resolution
        for resolution in range(limit // multiple * multiple, multiple, -multiple)
        if _longest(replace(cropping, resolution=resolution)) <= limit
    )
    return next(found, multiple)


def _longest(cropping: Cropping) -> int:
    """Returns the longest side of any bucket, in pixels."""
    return max(max(size) for size in cropping.sizes())
