"""The number and sizes of a run's images, for its plan.

If the folder of images does not exist yet, the plan assumes square images.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from halfbyte.trainer.data.caption_variants import all_variants
from halfbyte.trainer.data.read_sets import (
    croppings_of,
    first_style,
    held_out_views,
    set_settings,
    split_data,
    tables_folder,
    training_views,
)
from halfbyte.trainer.data.records.records import Records
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.found import SourceSettings
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.data.views.buckets import Size
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.hub.reference import HubData
from halfbyte.trainer.recipe.file_patterns import is_pattern
from halfbyte.trainer.recipe.recipe import Recipe


@dataclass(frozen=True)
class PlannedPictures:
    """The facts about the images that a plan needs."""

    count: int | None  # training images; None if unknown
    epoch: int | None  # samples in an epoch, with repeats; None if unknown
    sizes: frozenset[Size]  # sizes of training images, in pixels
    held_out_sizes: frozenset[Size]  # sizes of validation images, in pixels
    notes: tuple[str, ...]
    texts: int | None = None  # different captions to encode, with their variants; None if unknown

    @property
    def largest(self) -> Size:
        """The largest size of a training image."""
        return largest_size(self.sizes)

    @property
    def largest_held_out(self) -> Size:
        """The largest size of a validation image."""
        return largest_size(self.held_out_sizes)


def planned_pictures(recipe: Recipe, family: Family) -> PlannedPictures:
    """Returns the facts about a recipe's images; for sets that cannot be read yet, only the square sizes.

    Raises:
        DataError: all images are held out, or an image is both held out and trained on.
        RecipeError: a resolution does not suit the model.
    """
    settings = recipe.data.resolved_sets
    squares = frozenset(
        (cropping.resolution, cropping.resolution)
        for given in settings
        for cropping in croppings_of(given, family)
    )
    tables = tables_folder(recipe.data.cache_folder)
    read, notes = [], []
    for number, given in enumerate(settings):
        setting = "data.path" if recipe.data.path is not None else f"{given.setting}.path"
        own = replace(set_settings(recipe, number), tables=tables, renew=False)
        samples, note = _read(setting, given.path, CaptionStyle.of(given), own)
        read.append(samples)
        notes += note
    validation: Records | None = None
    if recipe.validation.path is not None:
        validation, note = _read(
            "validation.path", recipe.validation.path, first_style(recipe), SourceSettings()
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
    views = [group[0] for one in ordered for group in one.views]
    texts = {sample.caption for sample in data.held_out_samples}
    for one in data.sets:
        texts |= {text for _, text in all_variants(one.samples, one.settings, recipe.train.seed)}
    return PlannedPictures(
        data.count,
        sum(one.uses for one in ordered),
        frozenset((view.width, view.height) for view in views),
        frozenset((view.width, view.height) for view in held_out) or squares,
        tuple(notes),
        len(texts | set(recipe.sample.prompts) | {""}),
    )


def _read(
    setting: str, path: Path, style: CaptionStyle, settings: SourceSettings
) -> tuple[Records | None, list[str]]:
    """Returns the samples at a path, or None with a note that says why it cannot be read."""
    if HubData.of(path) is not None:
        return None, [f"{setting}: a plan does not download data sets; planned at data.resolution"]
    if not path.exists() and not is_pattern(path):
        return None, [f"{setting}: {path} does not exist; planned at data.resolution"]
    try:
        return read_samples(path, style, settings, is_decoded=lambda _: True), []
    except DataError as error:
        return None, [f"{setting}: {str(error).splitlines()[0]}; planned at data.resolution"]


def largest_size(sizes: Iterable[Size]) -> Size:
    """Returns the size with the largest area."""
    return max(sizes, key=lambda size: (size[0] * size[1], size))
