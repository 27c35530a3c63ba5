"""The number and sizes of a run's images, for its plan.

If the folder of images does not exist yet, the plan assumes square images.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from halfbyte.trainer.data.caption_variants import all_variants
from halfbyte.trainer.data.read_sets import (
    croppings_of,
    first_style,
    held_out_views,
    split_data,
    training_views,
    untrained_paths,
)
from halfbyte.trainer.data.references.find import reference_paths
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.folder import Sample, read_samples
from halfbyte.trainer.data.views.buckets import Size, View
from halfbyte.trainer.data.views.order import OrderedSet
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.recipe.recipe import Recipe

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
    read, notes = [], []
    for number, given in enumerate(settings):
        setting = "data.path" if recipe.data.path is not None else f"{given.setting}.path"
        samples, note = _read(
            setting,
            given.path,
            CaptionStyle.of(given),
            data_set=number,
            without=untrained_paths(given),
            skip_bad=recipe.data.on_bad_image == "skip",
        )
        read.append(samples)
        notes += note
    validation: list[Sample] | None = None
    if recipe.validation.path is not None:
        validation, note = _read(
            "validation.path",
            recipe.validation.path,
            first_style(recipe),
            without=reference_paths(replace(settings[0], path=recipe.validation.path)),
        )
        notes += note
    known = [samples for samples in read if samples is not None]
    if len(known) < len(read):
        return PlannedPictures(None, None, squares, squares, tuple(notes))
    data = split_data(recipe, known, validation if recipe.validation.path is None else validation or [])
    ordered = training_views(data, family, recipe.train.seed)
    held_out = held_out_views(data, family, recipe.train.seed)
    texts = {sample.caption for sample in data.held_out}
    for one in data.sets:
        texts |= {text for _, text in all_variants(one.samples, one.settings, recipe.train.seed)}
    return PlannedPictures(
        len(data.samples),
        sum(one.uses for one in ordered),
        _sizes(group[0] for one in ordered for group in one.views),
        _sizes(held_out) or squares,
        tuple(notes),
        len(texts | set(recipe.sample.prompts) | {""}),
        _shares(ordered),
    )


def _sizes(views: Iterable[View]) -> Sizes:
    found: defaultdict[int, set[Size]] = defaultdict(set)
    for view in views:
        found[view.resolution].add(view.size)
    return {resolution: frozenset(sizes) for resolution, sizes in found.items()}


def _shares(ordered: Sequence[OrderedSet]) -> dict[int, float]:
    """Returns the share of the samples that each resolution has, from 0 to 1."""
    shares: defaultdict[int, float] = defaultdict(float)
    total = sum(one.uses for one in ordered)
    for one in ordered:
        for group in one.views:
            shares[group[0].resolution] += one.uses / total / len(one.views)
    return dict(shares)


def _read(
    setting: str,
    path: Path,
    style: CaptionStyle,
    *,
    data_set: int = 0,
    without: frozenset[Path] = frozenset(),
    skip_bad: bool = False,
) -> tuple[list[Sample] | None, list[str]]:
    """Returns the samples of a folder, or None with a note that says why it cannot be read."""
    if not path.exists():
        return None, [f"{setting}: {path} does not exist; planned at data.resolution"]
    try:
        samples = read_samples(
            path,
            style,
            data_set=data_set,
            without=without,
            is_decoded=lambda _: True,
            skip_bad=skip_bad,
        )
        return samples, []
    except DataError as error:
        return None, [f"{setting}: {str(error).splitlines()[0]}; planned at data.resolution"]


def largest_size(sizes: Iterable[Size]) -> Size:
    """Returns the size with the largest area."""
    return max(sizes, key=lambda size: (size[0] * size[1], size))
