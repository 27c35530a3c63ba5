"""The number and sizes of a run's images, for its plan.

If the folder of images does not exist yet, the plan assumes square images.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.trainer.data.held_out import refuse_trained, set_aside
from halfbyte.trainer.data.sources.folder import Sample, read_samples
from halfbyte.trainer.data.views.buckets import Cropping, Size, nearest_size
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.recipe.recipe import Recipe


@dataclass(frozen=True)
class PlannedPictures:
    """The facts about the images that a plan needs."""

    count: int | None  # training images; None if unknown
    sizes: frozenset[Size]  # sizes of training images, in pixels
    held_out_sizes: frozenset[Size]  # sizes of validation images, in pixels
    notes: tuple[str, ...]

    @property
    def largest(self) -> Size:
        """The largest size of a training image."""
        return largest_size(self.sizes)

    @property
    def largest_held_out(self) -> Size:
        """The largest size of a validation image."""
        return largest_size(self.held_out_sizes)


def planned_pictures(recipe: Recipe, family: Family) -> PlannedPictures:
    """Returns the facts about a recipe's images; without an image folder, only the square size.

    Raises:
        DataError: all images are held out, or an image is both held out and trained on.
    """
    data, validation = recipe.data, recipe.validation
    square = frozenset({(data.resolution, data.resolution)})
    cropping = Cropping(data.resolution, family.size_multiple, data.aspect_buckets)
    samples, notes = _read("data.path", data.path, data.caption_prefix)
    held_out: Sequence[Sample] | None = None
    if validation.path is not None:
        held_out, more = _read("validation.path", validation.path, data.caption_prefix)
        notes = (*notes, *more)
        refuse_trained(held_out or (), samples or ())
    elif samples is not None:
        samples, held_out = set_aside(samples, validation.held_out)
    return PlannedPictures(
        None if samples is None else len(samples),
        square if samples is None else _sizes(samples, cropping),
        _sizes(held_out, cropping) if held_out else square,
        notes,
    )


def _read(setting: str, path: Path, caption_prefix: str) -> tuple[list[Sample] | None, tuple[str, ...]]:
    """Returns the samples of a folder, or None with a note that says why it cannot be read."""
    if not path.exists():
        return None, (f"{setting}: {path} does not exist; planned at data.resolution",)
    try:
        return read_samples(path, caption_prefix, is_decoded=lambda _: True), ()
    except DataError as error:
        return None, (f"{setting}: {str(error).splitlines()[0]}; planned at data.resolution",)


def _sizes(samples: Sequence[Sample], cropping: Cropping) -> frozenset[Size]:
    sizes = cropping.sizes()
    return frozenset(nearest_size(sample.width, sample.height, sizes) for sample in samples)


def largest_size(sizes: Iterable[Size]) -> Size:
    """Returns the size with the largest area."""
    return max(sizes, key=lambda size: (size[0] * size[1], size))
