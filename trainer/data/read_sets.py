"""Reads the images of a recipe's data sets and splits them into those to train on and those for validation."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from halfbyte.trainer.data.held_out import refuse_trained, set_aside
from halfbyte.trainer.data.records.problems import MOST_LINES
from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.data.references.find import reference_paths, refuse_more, with_references
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.found import SourceSettings
from halfbyte.trainer.data.sources.left_out import LeftOut
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.data.views.buckets import Cropping, Size, View, ViewGroups, views_of
from halfbyte.trainer.data.views.order import OrderedSet
from halfbyte.trainer.data.views.references import with_reference_views
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
    read = [
        read_set(
            given,
            replace(set_settings(recipe, number), tables=tables, most_problems=most_problems),
            is_decoded=is_decoded,
            progress=progress,
        )
        for number, given in enumerate(recipe.data.resolved_sets)
    ]
    validation = None
    if recipe.validation.path is not None:
        validation = read_validation(recipe, recipe.validation.path, common, is_decoded=is_decoded)
    return split_data(recipe, read, validation)


def tables_folder(cache: Path) -> Path:
    """Returns the folder in the cache that keeps what is known of images."""
    return cache / "images"


def read_validation(
    recipe: Recipe, path: Path, settings: SourceSettings, *, is_decoded: Callable[[str], bool]
) -> Sequence[Sample]:
    """Reads the images of validation.path, with references as the first data set says. Raises DataError."""
    first = replace(recipe.data.resolved_sets[0], path=path)
    own = replace(settings, without=reference_paths(first))
    samples = read_samples(path, first_style(recipe), own, is_decoded=is_decoded)
    return with_references(samples, first, is_decoded=is_decoded)


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
) -> ReadSet:
    """Reads the samples of a data set with masks and references. Arguments and errors are those of `read_samples`."""
    style, own = CaptionStyle.of(given), replace(settings, without=untrained_paths(given))
    left_out = LeftOut() if left_out is None else left_out
    samples = read_samples(
        given.path, style, own, is_decoded=is_decoded, progress=progress, left_out=left_out
    )
    paired = with_references(samples, given, is_decoded=is_decoded)
    if given.references.source != "none":
        for sample in paired:
            for reference in sample.references:
                left_out.reasons.pop(reference.path, None)
    return ReadSet(given, paired, samples.root, left_out)


def untrained_paths(settings: DataSet) -> frozenset[Path]:
    """Returns the folders and files with masks or references, which may be among the images of a data set."""
    masks = settings.masked_loss.folder
    return reference_paths(settings) | (frozenset() if masks is None else {masks})


def split_data(recipe: Recipe, read: Sequence[ReadSet], validation: Sequence[Sample] | None) -> ReadData:
    """Splits the samples of each data set into those to train on and those for validation.

    Args:
        validation: the samples of validation.path; None: they are chosen from the sets of the kind train.

    Raises:
        DataError: a set has nothing left to train on, or an image is both held out and trained on.
    """
    settings = recipe.data.resolved_sets
    trained: Sequence[Sequence[Sample]] = [one.samples for one in read]
    held_out: Sequence[Sequence[Sample]]
    if validation is None:
        choice = [number for number, given in enumerate(settings) if given.kind == "train"]
        setting = "data.path" if recipe.data.path is not None else "data.sets"
        trained, held_out = set_aside(trained, recipe.validation.held_out, setting=setting, from_sets=choice)
    else:
        held_out = [validation]
        for own in trained:
            refuse_trained(validation, own)
    for given, left in zip(settings, trained, strict=True):
        if not left:
            raise DataError(
                f"{given.setting}: all images of {printable(given.path)} are held out for validation; lower"
                " validation.held_out, or remove the set"
            )
    return ReadData([replace(one, samples=left) for one, left in zip(read, trained, strict=True)], held_out)


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


@dataclass(frozen=True)
class TrainedSet(OrderedSet):
    """The views of one data set, with references, and the groups that they were made from."""

    groups: ViewGroups


def training_views(data: ReadData, family: Family, seed: int) -> list[TrainedSet]:
    """Returns the views of each data set with the number of its samples in an epoch.

    Raises:
        DataError: an image has more references than the model takes.
    """
    if any(read.settings.references.source != "none" for read in data.sets):
        refuse_more([*data.samples(), *data.held_out_samples], family.max_references)
    groups: list[ViewGroups] = []
    views: list[Sequence[Sequence[View]]] = []
    for read in data.sets:
        croppings, only_largest = croppings_of(read.settings, family), read.settings.image_sizes == "largest"
        own = views_of(read.samples, croppings, seed, only_largest=only_largest)
        references = read.settings.references
        groups.append(own)
        has_references = references.source != "none"
        views.append(
            with_reference_views(own, croppings[0], references.resolution) if has_references else own
        )
    uses = set_uses([read.settings for read in data.sets], [len(own) for own in groups])
    return [TrainedSet(*one) for one in zip(views, uses, groups, strict=True)]


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
    references: int = 0  # reference images


def summaries(data: ReadData, ordered: Sequence[TrainedSet]) -> list[SetSummary]:
    """Returns a summary of each data set."""
    total = sum(one.uses for one in ordered)
    found = []
    for read, one in zip(data.sets, ordered, strict=True):
        sizes: defaultdict[int, list[Size]] = defaultdict(list)
        for resolution, size in one.groups.used_shapes:
            sizes[resolution].append(size)
        has_references = read.settings.references.source != "none"
        found.append(
            SetSummary(
                read.settings,
                len(read.samples),
                one.groups.view_count,
                one.uses,
                one.uses / total,
                sizes,
                1 - one.groups.mean_kept,
                len(one.groups.enlarged),
                read.left_out.describe(read.root),
                sum(len(sample.references) for sample in read.samples) if has_references else 0,
            )
        )
    return found


def held_out_views(data: ReadData, family: Family, seed: int) -> list[View]:
    """Returns one view of each validation image: a center crop, so that results do not depend on how training crops."""
    views = []
    for sample in data.held_out_samples:
        settings = data.sets[sample.data_set].settings
        croppings = croppings_of(replace(settings, crop="center", random_crops=1, flip=False), family)
        own = views_of([sample], croppings, seed, only_largest=True)
        views.append(with_reference_views(own, croppings[0], settings.references.resolution)[0][0])
    return views


def read_references(recipe: Recipe, folder: Path, *, is_decoded: Callable[[str], bool]) -> Sequence[Sample]:
    """Reads the reference images of the sample prompts. Raises DataError for unusable images."""
    return read_samples(folder, first_style(recipe), is_decoded=is_decoded)
