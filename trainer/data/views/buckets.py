"""Chooses the part and size at which each image is trained: aspect buckets, crops and mirroring."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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


def views_of(
    samples: Sequence[Sample], croppings: Sequence[Cropping], seed: int, *, only_largest: bool = False
) -> list[tuple[View, ...]]:
    """Returns groups of views, those of a group of one image and size; several with random crops or mirroring.

    An image has one group for each resolution for which it is large enough, or one at the smallest. Random crops
    depend on the image's bytes and the seed, not on its name or position in the data: adding an image does not change
    the crops of others.

    Args:
        croppings: one for each resolution, the smallest first.
        only_largest: give each image only the largest resolution for which it is large enough.
    """
    sizes = [cropping.sizes() for cropping in croppings]
    groups = []
    for sample in samples:
        nearest = [nearest_size(sample.width, sample.height, choice) for choice in sizes]
        fitting = [
            (cropping, size)
            for cropping, size in zip(croppings, nearest, strict=True)
            if _enlargement(sample, size) <= _SHARP
        ]
        chosen = (fitting[-1:] if only_largest else fitting) or [(croppings[0], nearest[0])]
        groups += [_views(sample, size, cropping, seed) for cropping, size in chosen]
    _warn_of_enlargement(groups)
    return groups


def _enlargement(sample: Sample, size: Size) -> float:
    """Returns the factor by which an image is enlarged to fill a size; below 1 if it is reduced."""
    return max(size[0] / sample.width, size[1] / sample.height)


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


def _warn_of_enlargement(groups: Sequence[Sequence[View]]) -> None:
    enlarged = {
        view.sample.path: enlargement(view) for views in groups for view in views if is_enlarged(view)
    }
    if enlarged:
        worst = max(enlarged, key=lambda path: enlarged[path])
        log.warning(
            "%d of %d images are smaller than their training size and will be enlarged, the most %s, by %.1f; lower"
            " data.resolution to keep them sharp",
            len(enlarged),
            len({view.sample.path for views in groups for view in views}),
            printable(worst),
            enlarged[worst],
        )
