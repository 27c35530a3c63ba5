"""The order of a whole run, as a function of its seed: which sample, at which position, in which micro-batch.

Epochs follow one another in one endless stream; each is a permutation of all samples keyed by (seed, epoch).
A sample's place in the stream is its position, the key of all its randomness. Samples of one size wait for
each other in a queue, across the ends of epochs, and leave it as a micro-batch as soon as it is full. So every
sample is trained on once an epoch, none is dropped or repeated to fill a batch, and the order depends on
batch_size * world_size alone: two processes of one picture do what one process of two does.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from halfbyte.trainer.data.buckets import Size, View
from halfbyte.trainer.randomness import generator, uniform


@dataclass(frozen=True)
class Entry:
    """One use of one sample."""

    position: int  # in the stream of the whole run, over all processes
    view: View


class SampleOrder:
    """The micro-batches of a run, without end; those of all processes together."""

    def __init__(self, views: Sequence[Sequence[View]], *, seed: int, global_batch: int) -> None:
        """`views` holds each sample's views, all of one size; `global_batch` is batch_size * world_size."""
        assert views, "a plan needs samples"
        assert global_batch > 0, "a micro-batch needs room"
        self._views = [tuple(group) for group in views]
        self._seed = seed
        self._global_batch = global_batch
        self._sizes: list[Size] = [(group[0].width, group[0].height) for group in self._views]
        self.pictures_by_size = Counter(self._sizes)

    def micro_batches(self, start: int = 0) -> Iterator[tuple[Entry, ...]]:
        """Micro-batch `start` and those after it. Costs about two epochs of bookkeeping, whatever `start`."""
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
        """(position, sample) through one epoch."""
        order = torch.randperm(len(self._views), generator=generator(self._seed, "epoch", epoch)).tolist()
        return list(enumerate(order, start=epoch * len(order)))

    def _emitted_before(self, epoch: int) -> int:
        """Micro-batches that are full when an epoch begins."""
        return sum(epoch * pictures // self._global_batch for pictures in self.pictures_by_size.values())

    def _last_epoch_before(self, micro_batch: int) -> int:
        """The last epoch that begins with at most this many micro-batches done."""
        low, high = 0, 1
        while self._emitted_before(high) <= micro_batch:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._emitted_before(middle) <= micro_batch else (low, middle)
        return low

    def _waiting_before(self, epoch: int) -> defaultdict[Size, list[tuple[int, int]]]:
        """The queues when an epoch begins: of each size the last few of the stream, found by walking back."""
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
