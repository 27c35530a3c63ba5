"""The number and sizes of a run's images, for its plan.

If the folder of images does not exist yet, the plan assumes square images.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from halfbyte.quant.files.patterns import is_pattern
from halfbyte.trainer.data.caption_variants import all_variants
from halfbyte.trainer.data.read_sets import (
    TrainedSet,
    croppings_of,
    held_out_views,
    read_set,
    read_validation,
    set_settings,
    split_data,
    tables_folder,
    training_views,
)
from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.data.sources.found import SourceSettings
from halfbyte.trainer.data.views.buckets import Size
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.hub.reference import HubData
from halfbyte.trainer.recipe.recipe import Recipe

Read = TypeVar("Read")
Sizes = Mapping[int, frozenset[Size]]  # by training resolution, in pixels


@dataclass(frozen=True)
class PlannedPictures:
    """The facts about the images that a plan needs."""

    count: int | None  # training images; None if unknown
    epoch: int | None  # samples in an epoch, with repeats; None if unknown
    sizes: Sizes  # of training images
    held_out_sizes: Sizes  # of validation images
    notes: tuple[str, ...]
    texts: int | None = None  # different captions to encode, with their variants; None if unknown
    shares: Mapping[int, float] = field(default_factory=dict)  # of samples, by resolution; empty if unknown

    @property
    def largest(self) -> Size:
        """The largest size of a training image."""
        return largest_size(size for sizes in self.sizes.values() for size in sizes)

    @property
    def largest_held_out(self) -> Size:
        """The largest size of a validation image."""
        return largest_size(size for sizes in self.held_out_sizes.values() for size in sizes)


def planned_pictures(recipe: Recipe, family: Family) -> PlannedPictures:
    """Returns the facts about a recipe's images; for sets that cannot be read yet, only the square sizes.

    Raises:
        DataError: all images are held out, or an image is both held out and trained on.
        RecipeError: a resolution does not suit the model.
    """
    settings = recipe.data.resolved_sets
    squares = {
        cropping.resolution: frozenset({(cropping.resolution, cropping.resolution)})
        for given in settings
        for cropping in croppings_of(given, family)
    }
    common = SourceSettings(tables=tables_folder(recipe.data.cache_folder), renew=False)
    read, notes = [], []
    for number, given in enumerate(settings):
        setting = "data.path" if recipe.data.path is not None else f"{given.setting}.path"
        own = replace(set_settings(recipe, number), tables=common.tables, renew=False)
        samples, note = _read(setting, given.path, partial(read_set, given, own))
        read.append(samples)
        notes += note
    validation: Sequence[Sample] | None = None
    if recipe.validation.path is not None:
        validation, note = _read(
            "validation.path",
            recipe.validation.path,
            partial(read_validation, recipe, recipe.validation.path, common),
        )
        notes += note
    known = [samples for samples in read if samples is not None]
    if len(known) < len(read):
        return PlannedPictures(None, None, squares, squares, tuple(notes))
    if recipe.validation.path is not None and validation is None:
        recipe = recipe.model_copy(update={"validation": recipe.validation.model_copy(update={"path": None})})
    data = split_data(recipe, known, validation)
    ordered = training_views(data, family, recipe.train.seed)
    held_out = held_out_views(data, family, recipe.train.seed)
    texts = {sample.caption for sample in data.held_out_samples}
    for one in data.sets:
        texts |= {text for _, text in all_variants(one.samples, one.settings, recipe.train.seed)}
    return PlannedPictures(
        data.count,
        sum(one.uses for one in ordered),
        _sizes(shape for one in ordered for shape in one.groups.used_shapes),
        _sizes((view.resolution, view.size) for view in held_out) or squares,
        tuple(notes),
        len(texts | set(recipe.sample.prompts) | {""}),
        _shares(ordered),
    )


def _sizes(shapes: Iterable[tuple[int, Size]]) -> Sizes:
    found: defaultdict[int, set[Size]] = defaultdict(set)
    for resolution, size in shapes:
        found[resolution].add(size)
    return {resolution: frozenset(sizes) for resolution, sizes in found.items()}


def _shares(ordered: Sequence[TrainedSet]) -> dict[int, float]:
    """Returns the share of the samples that each resolution has, from 0 to 1."""
    shares: defaultdict[int, float] = defaultdict(float)
    total = sum(one.uses for one in ordered)
    for one in ordered:
        for resolution, share in one.groups.shares().items():
            shares[resolution] += one.uses / total * share
    return dict(shares)


def _read(setting: str, path: Path, read: Callable[..., Read]) -> tuple[Read | None, list[str]]:
    """Returns what is read at a path, or None with a note that says why it cannot be read."""
    if HubData.of(path) is not None:
        return None, [f"{setting}: a plan does not download data sets; planned at data.resolution"]
    if not path.exists() and not is_pattern(path):
        return None, [f"{setting}: {path} does not exist; planned at data.resolution"]
    try:
        return read(is_decoded=lambda _: True), []
    except DataError as error:
        return None, [f"{setting}: {str(error).splitlines()[0]}; planned at data.resolution"]


def largest_size(sizes: Iterable[Size]) -> Size:
    """Returns the size with the largest area."""
    return max(sizes, key=lambda size: (size[0] * size[1], size))
