"""Reads the images of a recipe's data sets and splits them into those to train on and those for validation."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import fmean

from halfbyte.trainer.data.held_out import refuse_trained, set_aside
from halfbyte.trainer.data.records.problems import MOST_LINES
from halfbyte.trainer.data.records.records import Records
from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.found import SourceSettings
from halfbyte.trainer.data.sources.left_out import LeftOut
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.data.views.buckets import Cropping, Size, View, is_enlarged, kept_share, views_of
from halfbyte.trainer.data.views.order import OrderedSet
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.recipe.data_section import DataSet, set_uses
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.progress import LazyProgress
from halfbyte.trainer.wording import printable


@dataclass(frozen=True)
class ReadSet:
    """One data set with the samples that are trained on."""

    settings: DataSet
    samples: Sequence[Sample]
    root: Path  # the folder that the names of its images are relative to
    left_out: LeftOut = field(default_factory=LeftOut)  # images below its folder that are not for training


@dataclass(frozen=True)
class ReadData:
    """All images of a run."""

    sets: Sequence[ReadSet]
    held_out: Sequence[Sequence[Sample]]  # those of each set, or those of validation.path

    @property
    def count(self) -> int:
        """The number of samples that are trained on."""
        return sum(len(read.samples) for read in self.sets)

    @property
    def held_out_count(self) -> int:
        """The number of validation images."""
        return sum(map(len, self.held_out))

    def samples(self, step: int = 1) -> list[Sample]:
        """Returns each `step`-th sample that is trained on, in the order of the sets."""
        found: list[Sample] = []
        first = 0  # place in the set of the next sample to take
        for read in self.sets:
            found += read.samples[first::step]
            first = (first - len(read.samples)) % step
        return found

    @property
    def held_out_samples(self) -> Iterator[Sample]:
        """The validation images, in the order of the sets."""
        return chain.from_iterable(self.held_out)


def read_data(
    recipe: Recipe,
    *,
    is_decoded: Callable[[str], bool],
    tables: Path | None = None,
    most_problems: int | None = MOST_LINES,
    progress: LazyProgress | None = None,
) -> ReadData:
    """Reads all data sets and the validation images.

    Args:
        is_decoded: see `read_samples`.
        tables: the folder that keeps what was read for the next start; None: it is not kept.
        most_problems: lines of a message with problems; None: all.

    Raises:
        DataError: with the problems of all images, captions and masks of one set; or see `split_data`.
    """
    common = SourceSettings(tables=tables, most_problems=most_problems)
    left_out = [LeftOut() for _ in recipe.data.resolved_sets]
    read = [
        read_set(
            given,
            replace(set_settings(recipe, number), tables=tables, most_problems=most_problems),
            is_decoded=is_decoded,
            progress=progress,
            left_out=left_out[number],
        )
        for number, given in enumerate(recipe.data.resolved_sets)
    ]
    validation = None
    if recipe.validation.path is not None:
        style = first_style(recipe)
        validation = read_samples(recipe.validation.path, style, common, is_decoded=is_decoded)
    data = split_data(recipe, read, validation)
    sets = [replace(one, left_out=own) for one, own in zip(data.sets, left_out, strict=True)]
    return replace(data, sets=sets)


def tables_folder(cache: Path) -> Path:
    """Returns the folder in the cache that keeps what is known of images."""
    return cache / "images"


def first_style(recipe: Recipe) -> CaptionStyle:
    """Returns the style of the first data set's captions, which validation and reference images share."""
    return CaptionStyle.of(recipe.data.resolved_sets[0])


def set_settings(recipe: Recipe, number: int) -> SourceSettings:
    """Returns how the images of a data set are read."""
    settings = SourceSettings.of(recipe.data.resolved_sets[number], number)
    return replace(settings, skip_bad=recipe.data.on_bad_image == "skip")


def read_set(
    given: DataSet,
    settings: SourceSettings,
    *,
    is_decoded: Callable[[str], bool],
    progress: LazyProgress | None = None,
    left_out: LeftOut | None = None,
) -> Records:
    """Reads the samples of a data set with their masks. Arguments and errors are those of `read_samples`."""
    style = CaptionStyle.of(given)
    return read_samples(
        given.path, style, settings, is_decoded=is_decoded, progress=progress, left_out=left_out
    )


def split_data(recipe: Recipe, read: Sequence[Records], validation: Records | None) -> ReadData:
    """Splits the samples of each data set into those to train on and those for validation.

    Args:
        validation: the samples of validation.path; None: they are chosen from the sets of the kind train.

    Raises:
        DataError: a set has nothing left to train on, or an image is both held out and trained on.
    """
    settings = recipe.data.resolved_sets
    trained: Sequence[Sequence[Sample]] = read
    held_out: Sequence[Sequence[Sample]]
    if validation is None:
        choice = [number for number, given in enumerate(settings) if given.kind == "train"]
        setting = "data.path" if recipe.data.path is not None else "data.sets"
        trained, held_out = set_aside(read, recipe.validation.held_out, setting=setting, from_sets=choice)
    else:
        held_out = [validation]
        for own in read:
            refuse_trained(validation, own)
    for given, left in zip(settings, trained, strict=True):
        if not left:
            raise DataError(
                f"{given.setting}: all images of {printable(given.path)} are held out for validation; lower"
                " validation.held_out, or remove the set"
            )
    sets = [ReadSet(given, left, own.root) for given, left, own in zip(settings, trained, read, strict=True)]
    return ReadData(sets, held_out)


def croppings_of(settings: DataSet, family: Family) -> list[Cropping]:
    """Returns how a data set's images are cropped, one for each of its resolutions, the smallest first.

    Raises:
        RecipeError: a resolution does not suit the model.
    """
    return [
        Cropping(
            resolution,
            family.size_multiple,
            settings.aspect_buckets,
            settings.crop,
            settings.random_crops,
            settings.flip,
            settings.setting,
        )
        for resolution in settings.resolutions
    ]


def training_views(data: ReadData, family: Family, seed: int) -> list[OrderedSet]:
    """Returns the views of each data set with the number of its samples in an epoch."""
    groups = [
        views_of(
            read.samples,
            croppings_of(read.settings, family),
            seed,
            only_largest=read.settings.image_sizes == "largest",
        )
        for read in data.sets
    ]
    uses = set_uses([read.settings for read in data.sets], [len(own) for own in groups])
    return [OrderedSet(own, count) for own, count in zip(groups, uses, strict=True)]


@dataclass(frozen=True)
class SetSummary:
    """What a run takes from one data set, for the report before training."""

    settings: DataSet
    images: int
    views: int  # crops, mirrored copies and sizes of the images
    uses: int  # samples in an epoch
    share: float  # of all samples of the run, from 0 to 1
    sizes: Mapping[int, Sequence[Size]]  # the sizes that occur, by resolution, in pixels
    cropped: float  # the share of the images' pixels that cropping removes, from 0 to 1, in the mean
    enlarged: int  # images that are enlarged by more than 5 %
    left_out: str  # describes the images that are not for training; empty if there are none


def summaries(data: ReadData, ordered: Sequence[OrderedSet]) -> list[SetSummary]:
    """Returns a summary of each data set."""
    total = sum(one.uses for one in ordered)
    found = []
    for read, one in zip(data.sets, ordered, strict=True):
        views = [view for group in one.views for view in group]
        sizes: defaultdict[int, set[Size]] = defaultdict(set)
        for view in views:
            sizes[view.resolution].add((view.width, view.height))
        found.append(
            SetSummary(
                read.settings,
                len(read.samples),
                len(views),
                one.uses,
                one.uses / total,
                {resolution: sorted(sizes[resolution]) for resolution in sorted(sizes)},
                fmean(1 - kept_share(group[0]) for group in one.views),
                len({group[0].sample.index for group in one.views if is_enlarged(group[0])}),
                read.left_out.describe(read.root),
            )
        )
    return found


def held_out_views(data: ReadData, family: Family, seed: int) -> list[View]:
    """Returns one view of each validation image: a center crop, so that results do not depend on how training crops."""
    views = []
    for sample in data.held_out_samples:
        settings = data.sets[sample.data_set].settings
        center = replace(settings, crop="center", random_crops=1, flip=False)
        views.append(views_of([sample], croppings_of(center, family), seed, only_largest=True)[0][0])
    return views


def read_references(recipe: Recipe, folder: Path, *, is_decoded: Callable[[str], bool]) -> Sequence[Sample]:
    """Reads the reference images of the sample prompts. Raises DataError for unusable images."""
    return read_samples(folder, first_style(recipe), is_decoded=is_decoded)
