"""Chooses the part and size at which each image is trained: aspect buckets, crops and mirroring."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy
from numpy.typing import NDArray

from halfbyte.trainer.data.records.records import Records
from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.randomness import uniform
from halfbyte.trainer.wording import printable

log = logging.getLogger(__name__)

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the upright image
Size = tuple[int, int]  # width, height, in pixels

# Buckets with less than this share of resolution**2 are left out: they would train on less detail than the user
# expects from data.resolution.
_LEAST_AREA = 0.8
# An image is large enough for a resolution if it is enlarged by no more than this.
_SHARP = 1.05


@dataclass(frozen=True)
class View:
    """One crop of one image at one size, possibly mirrored. Each view has one cached latent."""

    sample: Sample
    box: Box
    width: int
    height: int
    flip: bool
    resolution: int  # the training resolution that the size belongs to, in pixels
    references: tuple["View", ...] = ()  # of its reference images, see `references`

    @property
    def size(self) -> Size:
        """Width and height in pixels."""
        return self.width, self.height

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes of the image and of its references. Samples of one batch have the same."""
        return self.size, *(reference.size for reference in self.references)


@dataclass(frozen=True)
class Cropping:
    """The settings that turn images into views: from the recipe's data section and the model."""

    resolution: int  # pixels: side of the square whose area no bucket exceeds
    size_multiple: int  # pixels: the VAE's downsampling factor times the denoiser's patch size
    aspect_buckets: bool = True
    crop: Literal["center", "random"] = "center"
    random_crops: int = 1
    flip: bool = False
    setting: str = "data"  # the section of the recipe that names the resolution

    def __post_init__(self) -> None:
        if self.resolution % self.size_multiple or self.resolution < self.size_multiple:
            low = max(self.resolution // self.size_multiple, 1) * self.size_multiple
            raise RecipeError(
                f"{self.setting}.resolution: got {self.resolution}, expected a multiple of {self.size_multiple} for"
                f" this model, such as {low} or {low + self.size_multiple}"
            )

    def sizes(self) -> list[Size]:
        """Returns the sizes to which images are resized; a single square without aspect buckets."""
        if not self.aspect_buckets:
            return [(self.resolution, self.resolution)]
        return bucket_sizes(self.resolution, self.size_multiple)


def bucket_sizes(resolution: int, size_multiple: int) -> list[Size]:
    """Returns the bucket sizes for a resolution, with aspect ratios from 1:4 to 4:1.

    No area exceeds resolution**2, so that the square needs the most memory. Sides are multiples of about a sixteenth
    of the resolution (64 at 1024): finer steps would reduce cropping very little and leave few images per bucket.
    """
    step = size_multiple * max(1, resolution // (16 * size_multiple))
    area = resolution * resolution
    sizes = {(resolution, resolution)}
    for width in range(step, 2 * resolution + 1, step):
        height = area // width // step * step
        if 4 * min(width, height) >= max(width, height) and width * height >= _LEAST_AREA * area:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def nearest_size(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """Returns the size that crops the least off an image; among equals, the largest."""

    def kept(size: Size) -> float:
        ratio = (size[0] * height) / (size[1] * width)
        return min(ratio, 1 / ratio)

    return max(sizes, key=lambda size: (round(kept(size), 6), size[0] * size[1], size))


class ViewGroups(Sequence[tuple[View, ...]]):
    """Groups of views, those of a group of one image and size; several with random crops or mirroring.

    A group is made when it is asked for. Takes about 20 bytes of memory for each.
    """

    def __init__(
        self, samples: Sequence[Sample], croppings: Sequence[Cropping], seed: int, *, only_largest: bool
    ) -> None:
        """See `views_of`."""
        self._samples = samples
        self._seed = seed
        self.shapes = [(cropping, size) for cropping in croppings for size in cropping.sizes()]
        numbers = {(cropping.resolution, size): number for number, (cropping, size) in enumerate(self.shapes)}
        sides, frames = _frames(samples)
        choice = [(cropping, cropping.sizes()) for cropping in croppings]
        chosen = [
            [numbers[cropping.resolution, size] for cropping, size in _chosen(frame, choice, only_largest)]
            for frame in sides
        ]
        most = max(map(len, chosen), default=0)
        table = numpy.array([own + [-1] * (most - len(own)) for own in chosen], numpy.int16).reshape(-1, most)
        kinds = table[frames].ravel()
        places = numpy.repeat(numpy.arange(len(samples), dtype=numpy.int32), most)
        self._places = places[kinds >= 0]
        self.kinds: NDArray[numpy.int16] = kinds[kinds >= 0]  # of each group, its number in `shapes`
        self._sides = sides
        self._frames = frames[self._places]

    def __len__(self) -> int:
        return len(self.kinds)

    @overload
    def __getitem__(self, number: int) -> tuple[View, ...]: ...
    @overload
    def __getitem__(self, number: slice) -> list[tuple[View, ...]]: ...

    def __getitem__(self, number: int | slice) -> tuple[View, ...] | list[tuple[View, ...]]:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        return self._group(self._samples[int(self._places[number])], int(self.kinds[number]))

    def __iter__(self) -> Iterator[tuple[View, ...]]:
        samples = enumerate(self._samples)
        place, sample = -1, None
        for number in range(len(self)):
            while place < self._places[number]:
                place, sample = next(samples)
            assert sample is not None, "the groups are in the order of the samples"
            yield self._group(sample, int(self.kinds[number]))

    def _group(self, sample: Sample, kind: int) -> tuple[View, ...]:
        cropping, size = self.shapes[kind]
        return _views(sample, size, cropping, self._seed)

    @property
    def view_count(self) -> int:
        """The number of views in all groups."""
        if all(cropping.crop == "center" for cropping, _ in self.shapes):
            return len(self) * (2 if any(cropping.flip for cropping, _ in self.shapes) else 1)
        return sum(map(len, self))

    @property
    def used_shapes(self) -> list[tuple[int, Size]]:
        """The resolutions and sizes that occur, in pixels, sorted."""
        used = (self.shapes[kind] for kind in numpy.unique(self.kinds).tolist())
        return sorted({(cropping.resolution, size) for cropping, size in used})

    def shares(self) -> dict[int, float]:
        """Returns the share of the groups that each resolution has, from 0 to 1."""
        found: defaultdict[int, float] = defaultdict(float)
        for kind, count in enumerate(numpy.bincount(self.kinds, minlength=len(self.shapes)).tolist()):
            if count:
                found[self.shapes[kind][0].resolution] += count / len(self)
        return dict(found)

    @property
    def mean_kept(self) -> float:
        """The share of the images' pixels that crops keep, from 0 to 1, in the mean over the groups."""
        return float(self._of_each(_kept).mean())

    @property
    def enlarged(self) -> dict[int, float]:
        """The places of images that are enlarged by more than 5 %, with the most that each is."""
        factors = self._of_each(_factor)
        found: dict[int, float] = {}
        for group in numpy.flatnonzero(factors > _SHARP).tolist():
            place = int(self._places[group])
            found[place] = max(found.get(place, 0.0), float(factors[group]))
        return found

    def _of_each(self, fact: Callable[[Size, Size], float]) -> NDArray[numpy.float64]:
        """Returns a fact about each group that depends only on the size of its image and its own size."""
        kinds = len(self.shapes)
        pairs, numbers = numpy.unique(
            self._frames.astype(numpy.int64) * kinds + self.kinds, return_inverse=True
        )
        facts = [fact(self._sides[pair // kinds], self.shapes[pair % kinds][1]) for pair in pairs.tolist()]
        return numpy.array(facts)[numbers]


def views_of(
    samples: Sequence[Sample], croppings: Sequence[Cropping], seed: int, *, only_largest: bool = False
) -> ViewGroups:
    """Returns groups of views, those of a group of one image and size; several with random crops or mirroring.

    An image has one group for each resolution for which it is large enough, or one at the smallest. Random crops
    depend on the image's bytes and the seed, not on its name or position in the data: adding an image does not change
    the crops of others.

    Args:
        croppings: one for each resolution, the smallest first.
        only_largest: give each image only the largest resolution for which it is large enough.
    """
    groups = ViewGroups(samples, croppings, seed, only_largest=only_largest)
    _warn_of_enlargement(samples, groups.enlarged)
    return groups


def _frames(samples: Sequence[Sample]) -> tuple[list[Size], NDArray[numpy.int32]]:
    """Returns the sizes of the images that occur, in pixels, and for each image the number of its size."""
    if isinstance(samples, Records):
        packed = samples.numbers("width").astype(numpy.int64) << 32 | samples.numbers("height")
    else:
        packed = numpy.array([sample.width << 32 | sample.height for sample in samples], numpy.int64)
    found, numbers = numpy.unique(packed, return_inverse=True)
    return [(side >> 32, side & 0xFFFFFFFF) for side in found.tolist()], numbers.astype(numpy.int32)


def _chosen(
    frame: Size, choice: Sequence[tuple[Cropping, Sequence[Size]]], only_largest: bool
) -> list[tuple[Cropping, Size]]:
    """Returns those of the croppings and their sizes at which an image of a size is trained."""
    nearest = [(cropping, nearest_size(*frame, sizes)) for cropping, sizes in choice]
    fitting = [one for one in nearest if max(one[1][0] / frame[0], one[1][1] / frame[1]) <= _SHARP]
    return (fitting[-1:] if only_largest else fitting) or nearest[:1]


def _kept(frame: Size, size: Size) -> float:
    """Returns the share of an image's pixels that a crop of a size keeps, wherever it is."""
    _, _, width, height = box_in((0, 0, *frame), size, 0, 0)
    return width * height / (frame[0] * frame[1])


def _factor(frame: Size, size: Size) -> float:
    """Returns the factor by which a crop is enlarged, see `enlargement`."""
    return size[0] / box_in((0, 0, *frame), size, 0, 0)[2]


def _views(sample: Sample, size: Size, cropping: Cropping, seed: int) -> tuple[View, ...]:
    whole = (0, 0, sample.width, sample.height)
    if cropping.crop == "center":
        boxes = [box_in(whole, size, 0.5, 0.5)]
    else:
        purpose = f"crop/{sample.sha256}"
        boxes = [
            box_in(whole, size, uniform(seed, purpose, number, 0), uniform(seed, purpose, number, 1))
            for number in range(cropping.random_crops)
        ]
    flips = (False, True) if cropping.flip else (False,)
    # An image with exactly the bucket's aspect ratio has only one possible crop. dict.fromkeys removes the copies.
    return tuple(
        View(sample, box, *size, flip, cropping.resolution) for box in dict.fromkeys(boxes) for flip in flips
    )


def box_in(outer: Box, size: Size, right: float, down: float) -> Box:
    """Returns the largest box in `outer` with a size's aspect ratio, at shares `right` and `down` of the free space."""
    across, high = outer[2] - outer[0], outer[3] - outer[1]
    scale = max(size[0] / across, size[1] / high)
    width = min(across, max(1, round(size[0] / scale)))
    height = min(high, max(1, round(size[1] / scale)))
    left = outer[0] + round((across - width) * right)
    top = outer[1] + round((high - height) * down)
    return (left, top, left + width, top + height)


def kept_share(view: View) -> float:
    """Returns the share of the image's pixels that the view's box holds, from 0 to 1."""
    left, top, right, bottom = view.box
    return (right - left) * (bottom - top) / (view.sample.width * view.sample.height)


def is_enlarged(view: View) -> bool:
    """Returns True if the view enlarges its part of the image by more than 5 %."""
    return enlargement(view) > _SHARP


def enlargement(view: View) -> float:
    """Returns the factor by which the view enlarges its part of the image; below 1 if it reduces it."""
    return view.width / (view.box[2] - view.box[0])


def _warn_of_enlargement(samples: Sequence[Sample], enlarged: Mapping[int, float]) -> None:
    if enlarged:
        worst = max(enlarged, key=lambda place: enlarged[place])
        log.warning(
            "%d of %d images are smaller than their training size and will be enlarged, the most %s, by %.1f; lower"
            " data.resolution to keep them sharp",
            len(enlarged),
            len(samples),
            printable(samples[worst].where),
            enlarged[worst],
        )
