"""The micro-batches of a run by training resolution, for its plan."""

from dataclasses import dataclass

from halfbyte.trainer.data.views.buckets import Size
from halfbyte.trainer.plan.pictures import PlannedPictures, largest_size
from halfbyte.trainer.recipe.batch_sizes import batch_at
from halfbyte.trainer.recipe.recipe import Recipe


@dataclass(frozen=True)
class PlannedBatch:
    """The micro-batches of one training resolution, as each process takes them."""

    resolution: int  # pixels
    samples: int
    size: Size  # the largest of its images, in pixels
    share: float  # of all micro-batches, from 0 to 1

    def is_within(self, other: "PlannedBatch") -> bool:
        """Returns True if it has no more samples and no more pixels than another batch, and fewer of one of them."""
        own = (self.samples, self.size[0] * self.size[1])
        others = (other.samples, other.size[0] * other.size[1])
        return own != others and all(mine <= theirs for mine, theirs in zip(own, others, strict=True))


def planned_batches(recipe: Recipe, before: Recipe, pictures: PlannedPictures) -> list[PlannedBatch]:
    """Returns the micro-batches of a recipe, one for each resolution that occurs, the smallest first.

    Args:
        before: the recipe whose images `pictures` describes. If `recipe` has other resolutions, its images are assumed
            to be squares.
    """
    resolutions, batch = recipe.data.resolutions, recipe.train.batch_size
    sizes = {side: (side, side) for side in resolutions}
    shares = dict.fromkeys(sizes, 1 / len(sizes))
    if resolutions == before.data.resolutions:
        sizes = {side: largest_size(pictures.sizes[side]) for side in sizes if side in pictures.sizes}
        shares = {side: pictures.shares.get(side, 1 / len(sizes)) for side in sizes}
    # Samples wait until their micro-batch is full, so a resolution has share / samples of the micro-batches.
    counts = {side: shares[side] / batch_at(batch, side) for side in sizes}
    total = sum(counts.values())
    return [
        PlannedBatch(side, batch_at(batch, side), size, counts[side] / total) for side, size in sizes.items()
    ]
