"""Batch sizes: one number for all images, or one for each training resolution."""

from collections.abc import Iterable, Mapping
from typing import TypeAlias

BatchSize: TypeAlias = int | Mapping[int, int]
"""Samples in a micro-batch: a number for all resolutions, or by resolution in pixels."""


def batch_at(batch: BatchSize, resolution: int) -> int:
    """Returns the samples in a micro-batch of images of one training resolution."""
    return batch if isinstance(batch, int) else batch[resolution]


def over_processes(batch: BatchSize, processes: int) -> BatchSize:
    """Returns the samples of a micro-batch over all processes; a single number if all resolutions have the same."""
    if isinstance(batch, int):
        return batch * processes
    sizes = {resolution: size * processes for resolution, size in sorted(batch.items())}
    return next(iter(sizes.values())) if len(set(sizes.values())) == 1 else sizes


def scaled_by_area(batch: Mapping[int, int], resolutions: Iterable[int]) -> dict[int, int]:
    """Returns a batch size for each resolution: that of `batch`, or else the largest with no more pixels than those."""
    wanted = sorted(resolutions)
    known = {side: samples for side, samples in batch.items() if side in wanted} or batch
    pixels = max(samples * side**2 for side, samples in known.items())
    return {side: known.get(side, max(1, pixels // side**2)) for side in wanted}
