"""Which part of a picture is trained on, at which size: aspect buckets, crops and mirror images."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from halfbyte.trainer.data.folder import Sample
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.randomness import uniform

log = logging.getLogger(__name__)

Box = tuple[int, int, int, int]  # left, top, right, bottom: pixels of the upright picture
Size = tuple[int, int]  # width, height: pixels

# A bucket much smaller than asked for would train on less detail than the user thinks.
_LEAST_AREA = 0.8


@dataclass(frozen=True)
class View:
    """One crop of one picture at one size: what a cached latent is made from."""

    sample: Sample
    box: Box
    width: int
    height: int
    flip: bool


@dataclass(frozen=True)
class Cropping:
    """How pictures become views: the recipe's data section, and what sizes the model takes."""

    resolution: int  # pixels: the side of the square whose area no bucket exceeds
    size_multiple: int  # pixels: the VAE's factor times the denoiser's patch
    aspect_buckets: bool = True
    crop: Literal["center", "random"] = "center"
    random_crops: int = 1
    flip: bool = False

    def __post_init__(self) -> None:
        if self.resolution % self.size_multiple or self.resolution < self.size_multiple:
            low = max(self.resolution // self.size_multiple, 1) * self.size_multiple
            raise RecipeError(
                f"data.resolution: got {self.resolution}, expected a multiple of {self.size_multiple} for this"
                f" model, such as {low} or {low + self.size_multiple}"
            )

    def sizes(self) -> list[Size]:
        """The sizes pictures are brought to; one square without aspect buckets."""
        if not self.aspect_buckets:
            return [(self.resolution, self.resolution)]
        return bucket_sizes(self.resolution, self.size_multiple)


def bucket_sizes(resolution: int, size_multiple: int) -> list[Size]:
    """Sizes from 1:4 to 4:1 whose area is at most resolution**2, so that the square bounds the memory.

    Sides step by a sixteenth of the resolution or so (64 at 1024): finer steps would crop hardly less and
    leave few pictures in a bucket.
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
    """The size that keeps most of a picture; of equal ones the largest."""

    def kept(size: Size) -> float:
        ratio = (size[0] * height) / (size[1] * width)
        return min(ratio, 1 / ratio)

    return max(sizes, key=lambda size: (round(kept(size), 6), size[0] * size[1], size))


def views_of(samples: Sequence[Sample], cropping: Cropping, seed: int) -> list[tuple[View, ...]]:
    """The views of each sample, all of one size; several where crops are random or mirror images wanted.

    A random crop depends on the picture's bytes and the seed, not on its name or place: adding a picture
    changes no other's crops.
    """
    sizes = cropping.sizes()
    groups = [
        _views(sample, nearest_size(sample.width, sample.height, sizes), cropping, seed) for sample in samples
    ]
    _warn_of_enlargement(groups)
    return groups


def _views(sample: Sample, size: Size, cropping: Cropping, seed: int) -> tuple[View, ...]:
    if cropping.crop == "center":
        boxes = [_box(sample, size, 0.5, 0.5)]
    else:
        purpose = f"crop/{sample.sha256}"
        boxes = [
            _box(sample, size, uniform(seed, purpose, number, 0), uniform(seed, purpose, number, 1))
            for number in range(cropping.random_crops)
        ]
    flips = (False, True) if cropping.flip else (False,)
    # A picture of the bucket's own proportions has one crop only, however many are asked for.
    return tuple(View(sample, box, *size, flip) for box in dict.fromkeys(boxes) for flip in flips)


def _box(sample: Sample, size: Size, right: float, down: float) -> Box:
    """The largest box of the size's proportions, moved by the given shares of the room there is."""
    scale = max(size[0] / sample.width, size[1] / sample.height)
    width = min(sample.width, max(1, round(size[0] / scale)))
    height = min(sample.height, max(1, round(size[1] / scale)))
    left = round((sample.width - width) * right)
    top = round((sample.height - height) * down)
    return (left, top, left + width, top + height)


def _warn_of_enlargement(groups: Sequence[Sequence[View]]) -> None:
    factors = {
        view.sample.path: view.width / (view.box[2] - view.box[0]) for views in groups for view in views
    }
    enlarged = {path: factor for path, factor in factors.items() if factor > 1.05}
    if enlarged:
        worst = max(enlarged, key=lambda path: enlarged[path])
        log.warning(
            "%d of %d pictures are smaller than they are trained at and will be enlarged, %s by %.1f; a lower"
            " data.resolution would keep them sharp",
            len(enlarged),
            len(groups),
            worst,
            enlarged[worst],
        )
