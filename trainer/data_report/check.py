"""Checks a recipe's data without a GPU, and collects what its page shows: each image as the model will see it."""

import base64
import hashlib
import io
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path

import numpy
from PIL import Image
from rich.console import Console

from halfbyte.trainer.data.caption_variants import variants
from halfbyte.trainer.data.pictures.decode import decode
from halfbyte.trainer.data.read_sets import (
    ReadData,
    SetSummary,
    TrainedSet,
    held_out_views,
    read_data,
    summaries,
    training_views,
)
from halfbyte.trainer.data.record import name_in
from halfbyte.trainer.data.records.records import digests_of
from halfbyte.trainer.data.sources.contents import load_mask, sample_bytes
from halfbyte.trainer.data.views.buckets import View, enlargement, is_enlarged, kept_share
from halfbyte.trainer.data_report.duplicates import MOST_COMPARED, equal_images, fingerprint, near_images
from halfbyte.trainer.errors import HalfbyteError
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.token_limits import TokenLimit, token_limits
from halfbyte.trainer.plan.fit import open_planner
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.progress import LazyProgress, OnProgress

_TEXTS_AT_A_TIME = 10_000
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
        held_out = held_out_views(data, family, recipe.train.seed)
        limit = _limit(family, notes)
        texts, cut = _count_texts(data, recipe, limit)
        images = _Images(data, recipe)
        page = _Page(data, recipe, limit, images)
        drawing = LazyProgress(console, "drawing the page", "image")
        shown, codes = page.drawn(ordered, held_out, most, drawing)
        drawing.close()
    if len(images) > MOST_COMPARED:
        notes.append(
            f"similar images were not looked for, because there are more than {MOST_COMPARED:,} images"
        )
    near = near_images(codes, images.digests[: len(codes)].tolist())
    return DataReport(
        summaries(data, ordered),
        len(held_out),
        shown,
        sum(len(one.views) for one in ordered) + len(held_out) - len(shown),
        [[images.name(place) for place in group] for group in equal_images(images.digests)],
        [(images.name(one), images.name(other)) for one, other in near],
        cut,
        texts,
        notes,
    )


class _Images:
    """All images of a recipe in one order: those that are trained, by set, and the validation images."""

    def __init__(self, data: ReadData, recipe: Recipe) -> None:
        self._parts = [*(read.samples for read in data.sets), *data.held_out]
        roots = [read.root for read in data.sets]
        own = recipe.validation.path
        self._roots = [*roots, *(roots if own is None else [own])]
        self._starts = [0, *accumulate(map(len, self._parts))]
        self.digests = numpy.concatenate([digests_of(part) for part in self._parts])

    def __len__(self) -> int:
        return self._starts[-1]

    def name(self, place: int) -> str:
        """Returns the name of an image."""
        part = bisect_right(self._starts, place) - 1
        return name_in(self._roots[part], self._parts[part][place - self._starts[part]])


class _Page:
    """Makes what the page shows of each image."""

    def __init__(self, data: ReadData, recipe: Recipe, limit: TokenLimit | None, images: _Images) -> None:
        self._data = data
        self._recipe = recipe
        self._limit = limit
        self._compares = len(images) <= MOST_COMPARED

    def drawn(
        self, ordered: Sequence[TrainedSet], held_out: Sequence[View], most: int, progress: OnProgress
    ) -> tuple[list[Shown], list[int]]:
        """Returns the first views, at most `most`, and the fingerprints of all images if they are few enough."""
        roots = [read.root for read in self._data.sets]
        validation = self._recipe.validation.path
        shown: list[Shown] = []
        codes: list[int] = []
        total = sum(len(one.views) for one in ordered) + len(held_out)
        last: tuple[bool, int, int] | None = None
        trained = ((group[0], False) for one in ordered for group in one.views)
        for number, (view, is_held_out) in enumerate(
            chain(trained, ((view, True) for view in held_out)), start=1
        ):
            sample = view.sample
            # The views of an image follow each other.
            key = (is_held_out, sample.data_set, sample.index)
            is_new, last = key != last, key
            if len(shown) < most or (is_new and self._compares):
                picture = decode(sample_bytes(sample), view.box)
                if is_new and self._compares:
                    codes.append(fingerprint(picture))
                if len(shown) < most:
                    root = validation if is_held_out and validation is not None else roots[sample.data_set]
                    shown.append(self._shown(view, picture, name_in(root, sample), held_out=is_held_out))
            elif not self._compares:
                break
            progress(number, total)
        return shown, codes

    def _shown(self, view: View, picture: Image.Image, name: str, *, held_out: bool) -> Shown:
        sample, read = view.sample, self._data.sets[view.sample.data_set]
        texts = [sample.caption] if held_out else variants(sample, read.settings, self._recipe.train.seed)
        cut = [""] * len(texts) if self._limit is None else self._limit.cut(texts)
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
            [Caption(text.removesuffix(end), end) for text, end in zip(texts, cut, strict=True)],
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


def _limit(family: Family, notes: list[str]) -> TokenLimit | None:
    try:
        return token_limits(family)[0]
    except HalfbyteError as error:
        notes.append(f"the lengths of captions were not checked: {error}")
        return None


def _count_texts(data: ReadData, recipe: Recipe, limit: TokenLimit | None) -> tuple[int, int]:
    """Returns the number of different texts of all samples, and of those that T5 cuts."""
    trained = (
        text
        for read in data.sets
        for sample in read.samples
        for text in variants(sample, read.settings, recipe.train.seed)
    )
    every = chain(trained, (sample.caption for sample in data.held_out_samples))
    known: set[bytes] = set()  # digests, which take less memory than the texts
    cut = 0
    while some := list(islice(every, _TEXTS_AT_A_TIME)):
        new = []
        for text in some:
            digest = hashlib.blake2b(text.encode(), digest_size=12).digest()
            if digest not in known:
                known.add(digest)
                new.append(text)
        if limit is not None:
            cut += sum(bool(end) for end in limit.cut(new))
    return len(known), cut


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
