"""Orders the samples of a whole run, as a function of its seed: their positions and their micro-batches.

Epochs form one endless stream; each is a permutation of all samples, keyed by (seed, epoch). The index of a sample in
the stream is its position, which keys all its random numbers. Samples of one size wait in a queue, across the ends of
epochs, and leave it as a micro-batch when it is full. Every sample is therefore trained on once per epoch; none is
dropped, or repeated to fill a batch. The order depends on batch sizes only through batch_size * world_size: two
processes with one image each train the same micro-batches as one process with two.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from halfbyte.trainer.data.views.buckets import Size, View
from halfbyte.trainer.randomness import generator, uniform


@dataclass(frozen=True)
class Entry:
    """One use of one sample in the run."""

    position: int  # in the stream of the whole run, over all processes
    view: View


class SampleOrder:
    """The endless sequence of a run's micro-batches, each over all processes."""

    def __init__(self, views: Sequence[Sequence[View]], *, seed: int, global_batch: int) -> None:
        """`views` holds each sample's views, all of one size; `global_batch` is batch_size * world_size."""
        assert views, "an order needs samples"
        assert global_batch > 0, "a micro-batch needs room"
        self._views = [tuple(group) for group in views]
        self._seed = seed
        self._global_batch = global_batch
        self._sizes: list[Size] = [(group[0].width, group[0].height) for group in self._views]
        self.pictures_by_size = Counter(self._sizes)

    def micro_batches(self, start: int = 0) -> Iterator[tuple[Entry, ...]]:
        """Yields micro-batch `start` and all later ones. Starting takes two epochs of shuffling, at any `start`."""
        epoch = self._last_epoch_before(start)
        queues = self._waiting_before(epoch)
        number = self._emitted_before(epoch)
        for current in count(epoch):
            for position, sample in self._stream(current):
                queue = queues[self._sizes[sample]]
                queue.append((position, sample))
                if len(queue) < self._global_batch:
                    continue
                if number >= start:
                    yield tuple(self._entry(*item) for item in queue)
                number += 1
                queue.clear()

    def _entry(self, position: int, sample: int) -> Entry:
        views = self._views[sample]
        return Entry(position, views[int(uniform(self._seed, "view", position) * len(views))])

    def _stream(self, epoch: int) -> list[tuple[int, int]]:
        """Returns (position, sample index) for each use in one epoch, in order."""
        order = torch.randperm(len(self._views), generator=generator(self._seed, "epoch", epoch)).tolist()
        return list(enumerate(order, start=epoch * len(order)))

    def _emitted_before(self, epoch: int) -> int:
        """Returns the number of micro-batches that are complete when an epoch begins."""
        return sum(epoch * pictures // self._global_batch for pictures in self.pictures_by_size.values())

    def _last_epoch_before(self, micro_batch: int) -> int:
        """Returns the last epoch that begins with at most this many micro-batches complete, by bisection."""
        low, high = 0, 1
        while self._emitted_before(high) <= micro_batch:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._emitted_before(middle) <= micro_batch else (low, middle)
        return low

    def _waiting_before(self, epoch: int) -> defaultdict[Size, list[tuple[int, int]]]:
        """Rebuilds the queues at the beginning of an epoch: for each size, its last few samples in the stream.

        The lengths follow from the counts, so walking the stream backwards until the queues are full is enough.
        """
        missing = {
            size: epoch * pictures % self._global_batch for size, pictures in self.pictures_by_size.items()
        }
        queues: defaultdict[Size, list[tuple[int, int]]] = defaultdict(list)
        while any(missing.values()):
            epoch -= 1
            for position, sample in reversed(self._stream(epoch)):
                size = self._sizes[sample]
                if missing[size]:
                    queues[size].append((position, sample))
                    missing[size] -= 1
        for queue in queues.values():
            queue.reverse()
        return queues
