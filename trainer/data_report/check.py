"""Checks a recipe's data without a GPU, and collects what its page shows: each image as the model will see it."""

import base64
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console

from halfbyte.trainer.data.caption_variants import variants
from halfbyte.trainer.data.pictures.decode import decode
from halfbyte.trainer.data.read_sets import (
    ReadData,
    SetSummary,
    held_out_views,
    read_data,
    summaries,
    training_views,
)
from halfbyte.trainer.data.record import name_in
from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.data.sources.contents import load_mask, sample_bytes
from halfbyte.trainer.data.views.buckets import View, enlargement, is_enlarged, kept_share
from halfbyte.trainer.data_report.duplicates import MOST_COMPARED, equal_images, fingerprint, near_images
from halfbyte.trainer.errors import HalfbyteError
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.token_limits import TokenLimit, token_limits
from halfbyte.trainer.plan.fit import open_planner
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.progress import LazyProgress

_THUMBNAIL = 224  # pixels, the longer side
_SHADE = 0.75  # how much of the light a mask takes from parts that are not learned


@dataclass(frozen=True)
class Caption:
    """The text of one variant, with the end that T5 does not read."""

    read: str
    cut: str


@dataclass(frozen=True)
class Reference:
    """A reference image next to its image."""

    name: str  # of the file
    size: str  # of the file and of the view
    picture: str  # a JPEG as a data URL: the crop as the model gets it


@dataclass(frozen=True)
class Shown:
    """One image on the page."""

    name: str
    group: str  # the data set, or the validation images
    size: str  # of the file and of the view
    picture: str  # a JPEG as a data URL: the crop as it is trained, darker where a mask hides it
    captions: Sequence[Caption]
    notes: Sequence[str]
    references: Sequence[Reference] = ()


@dataclass(frozen=True)
class DataReport:
    """What was found in a recipe's data."""

    summaries: Sequence[SetSummary]
    held_out: int
    shown: Sequence[Shown]
    hidden: int  # images that the page leaves out, because there are more than it may show
    equal: Sequence[Sequence[str]]  # names of images with the same bytes
    near: Sequence[tuple[str, str]]
    cut: int  # texts that are longer than T5 reads
    texts: int
    notes: Sequence[str]


def check_data(recipe: Recipe, console: Console, *, most: int) -> DataReport:
    """Reads and checks all data of a recipe.

    Args:
        most: images that the page shows.

    Raises:
        DataError: with one line for each image, caption or mask that cannot be used.
        RecipeError, HubError: the model's configuration cannot be read, or a resolution does not suit it.
    """
    with tempfile.TemporaryDirectory() as folder:
        planner = open_planner(recipe, Path(folder))
        family, notes = planner.family, list(planner.notes)
        reading = LazyProgress(console, "reading images", "image")
        data = read_data(recipe, is_decoded=lambda sha256: False, most_problems=None, progress=reading)
        reading.close()
        ordered = training_views(data, family, recipe.train.seed)
        views = [group[0] for one in ordered for group in one.views]
        held_out = held_out_views(data, family, recipe.train.seed)
        limit = _limit(family, notes)
        texts = _texts(data, recipe)
        cut = dict(zip(texts, [""] * len(texts) if limit is None else limit.cut(texts), strict=True))
    roots = [read.root for read in data.sets]
    names = {view.sample: name_in(roots[view.sample.data_set], view.sample) for view in views}
    for view in held_out:
        sample = view.sample
        names[sample] = name_in(recipe.validation.path or roots[sample.data_set], sample)
    samples = list(names)
    digests = [sample.sha256 for sample in samples]
    equal = equal_images(digests)
    drawing = LazyProgress(console, "drawing the page", "image")
    shown: list[Shown] = []
    codes: dict[Sample, int] = {}
    every = [*views, *held_out]
    for number, view in enumerate(every, start=1):
        if view.sample not in codes or len(shown) < most:
            picture = decode(sample_bytes(view.sample), view.box)
            codes.setdefault(view.sample, fingerprint(picture))
            if len(shown) < most:
                shown.append(
                    _shown(view, picture, names[view.sample], data, recipe, cut, held_out=number > len(views))
                )
        drawing(number, len(every))
    drawing.close()
    if len(samples) > MOST_COMPARED:
        notes.append(
            f"similar images were not looked for, because there are more than {MOST_COMPARED:,} images"
        )
    near = near_images([codes[sample] for sample in samples], digests)
    return DataReport(
        summaries(data, ordered),
        len(held_out),
        shown,
        len(every) - len(shown),
        [[names[samples[place]] for place in group] for group in equal],
        [(names[samples[one]], names[samples[other]]) for one, other in near],
        sum(bool(end) for end in cut.values()),
        len(texts),
        notes,
    )


def _limit(family: Family, notes: list[str]) -> TokenLimit | None:
    try:
        return token_limits(family)[0]
    except HalfbyteError as error:
        notes.append(f"the lengths of captions were not checked: {error}")
        return None


def _texts(data: ReadData, recipe: Recipe) -> list[str]:
    """Returns the different texts of all samples."""
    every = [
        text
        for read in data.sets
        for sample in read.samples
        for text in variants(sample, read.settings, recipe.train.seed)
    ]
    return list(dict.fromkeys([*every, *(sample.caption for sample in data.held_out_samples)]))


def _shown(
    view: View,
    picture: Image.Image,
    name: str,
    data: ReadData,
    recipe: Recipe,
    cut: dict[str, str],
    *,
    held_out: bool,
) -> Shown:
    sample, read = view.sample, data.sets[view.sample.data_set]
    texts = [sample.caption] if held_out else variants(sample, read.settings, recipe.train.seed)
    notes = []
    if is_enlarged(view):
        notes.append(f"enlarged {enlargement(view):.2f} times")
    if (kept := kept_share(view)) < 1:
        notes.append(f"{1 - kept:.0%} cropped")
    if view.flip:
        notes.append("mirrored")
    if sample.mask is not None:
        notes.append("masked")
        picture = _masked(view, picture)
    return Shown(
        name,
        "validation" if held_out else read.settings.setting,
        _sizes(view),
        _thumbnail(picture),
        [Caption(text.removesuffix(cut[text]), cut[text]) for text in texts],
        notes,
        [
            Reference(
                reference.sample.path.name,
                _sizes(reference),
                _thumbnail(decode(sample_bytes(reference.sample), reference.box)),
            )
            for reference in view.references
        ],
    )


def _sizes(view: View) -> str:
    return f"{view.sample.width}x{view.sample.height} to {view.width}x{view.height}"


def _thumbnail(picture: Image.Image) -> str:
    """Returns a reduced picture as a data URL; changes `picture`."""
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _masked(view: View, picture: Image.Image) -> Image.Image:
    """Returns a picture that is darker where its mask is black."""
    whole = load_mask(view.sample).resize((view.sample.width, view.sample.height))
    light = whole.crop(view.box).point(lambda value: round(255 - _SHADE * (255 - value)))
    return Image.composite(picture, Image.new("RGB", picture.size), light)
