"""Orders the samples of a whole run, as a function of its seed: their positions and their micro-batches.

Epochs form one endless stream. In an epoch each data set gives a fixed number of samples, evenly spread over the
epoch, so that the sets keep their shares over any part of the run. A set goes through its samples again and again, each
time in another permutation, keyed by (seed, pass, set). The index of a sample in the stream is its position, which keys
all its random numbers. Samples of one size wait in a queue, across the ends of epochs, and leave it as a micro-batch
when it is full. Every sample is therefore trained as often as its set says; none is dropped, or repeated to fill a
batch. The order depends on batch sizes only through batch_size * world_size: two processes with one image each train
the same micro-batches as one process with two.

A queue holds samples whose image and reference images have the same sizes, and that have the same batch size: each
training resolution may have its own.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy
import torch
from numpy.typing import NDArray

from halfbyte.trainer.data.views.buckets import Size, View, ViewGroups
from halfbyte.trainer.randomness import generator, uniform
from halfbyte.trainer.recipe.batch_sizes import BatchSize, batch_at

_Use = tuple[int, int, int]  # position, set, sample of the set
# The sizes of an image and its references, and the samples of a micro-batch.
_Kind = tuple[tuple[Size, ...], int]
_BLOCK = 4096  # uses that are Python objects at a time


@dataclass(frozen=True)
class Entry:
    """One use of one sample in the run."""

    position: int  # in the stream of the whole run, over all processes
    view: View
    share: float = 1.0  # factor of its micro-batch's mean loss, see `PlannedBatches`


@dataclass(frozen=True)
class OrderedSet:
    """One data set as the order sees it."""

    views: Sequence[Sequence[View]]  # of each sample, all of one size
    uses: int  # samples in an epoch; the number of samples for one pass over the set


class SampleOrder:
    """The endless sequence of a run's micro-batches, each over all processes."""

    def __init__(self, sets: Sequence[OrderedSet], *, seed: int, global_batch: BatchSize) -> None:
        """`global_batch` is batch_size * world_size, the samples of a micro-batch over all processes."""
        assert sets, "an order needs sets"
        assert all(given.views and given.uses > 0 for given in sets), "an order needs samples"
        self._sets = [(given.views, given.uses) for given in sets]
        self._seed = seed
        self._turns = _spread([given.uses for given in sets])
        numbers: dict[_Kind, int] = {}
        self._kinds = [_numbered(given.views, global_batch, numbers) for given in sets]  # of each sample
        self._known = list(numbers)
        self._counts = [numpy.bincount(kinds, minlength=len(numbers)) for kinds in self._kinds]
        self.kinds = frozenset(
            kind for number, kind in enumerate(self._known) if any(counts[number] for counts in self._counts)
        )
        assert all(samples > 0 for _, samples in self.kinds), "a micro-batch needs room"

    @property
    def epoch_length(self) -> int:
        """The number of samples of an epoch, over all sets."""
        return len(self._turns)

    @property
    def mean_batch(self) -> float:
        """The samples of a micro-batch over all processes, in the mean over the run."""
        batches = sum(
            uses / len(views) * images / samples
            for counts, (views, uses) in zip(self._counts, self._sets, strict=True)
            for (_, samples), images in zip(self._known, counts.tolist(), strict=True)
        )
        return self.epoch_length / batches

    def micro_batches(self, start: int = 0) -> Iterator[tuple[Entry, ...]]:
        """Yields micro-batch `start` and all later ones. Starting takes two epochs of shuffling, at any `start`."""
        epoch = self._last_epoch_before(start)
        queues = self._waiting_before(epoch)
        number = self._emitted_before(epoch)
        for current in count(epoch):
            for kind, *use in self._stream(current):
                queue = queues[kind]
                queue.append((use[0], use[1], use[2]))
                if len(queue) < self._known[kind][1]:
                    continue
                if number >= start:
                    yield tuple(self._entry(*item) for item in queue)
                number += 1
                queue.clear()

    def _entry(self, position: int, turn: int, sample: int) -> Entry:
        views = self._sets[turn][0][sample]
        return Entry(position, views[int(uniform(self._seed, "view", position) * len(views))])

    def _stream(self, epoch: int, *, backwards: bool = False) -> Iterator[tuple[int, int, int, int]]:
        """Yields (kind, position, set, sample of the set) for each use in one epoch, in order or backwards."""
        samples = numpy.empty(self.epoch_length, numpy.int64)
        kinds = numpy.empty(self.epoch_length, numpy.int32)
        for turn in range(len(self._sets)):
            own = self._turns == turn
            samples[own] = self._draws(turn, epoch)
            kinds[own] = self._kinds[turn][samples[own]]
        first = epoch * self.epoch_length
        step = -1 if backwards else 1
        for start in range(0, self.epoch_length, _BLOCK)[::step]:
            block = slice(start, start + _BLOCK)
            columns = (kinds[block], self._turns[block], samples[block])
            positions = range(first + start, first + start + len(columns[0]))
            yield from (
                (kind, position, turn, sample)
                for kind, position, turn, sample in zip(
                    columns[0][::step].tolist(),
                    positions[::step],
                    columns[1][::step].tolist(),
                    columns[2][::step].tolist(),
                    strict=True,
                )
            )

    def _draws(self, turn: int, epoch: int) -> NDArray[numpy.int64]:
        """Returns the samples that a set gives in one epoch, in order."""
        views, uses = self._sets[turn]
        number, skipped = divmod(epoch * uses, len(views))
        parts = []
        while uses > 0:
            parts.append(self._pass(turn, number)[skipped : skipped + uses])
            uses -= len(parts[-1])
            number, skipped = number + 1, 0
        return numpy.concatenate(parts)

    def _pass(self, turn: int, number: int) -> NDArray[numpy.int64]:
        """Returns the order of a set's samples in its pass `number`."""
        position = (number, turn) if turn else (number,)
        drawn = torch.randperm(len(self._sets[turn][0]), generator=generator(self._seed, "epoch", *position))
        return drawn.numpy()

    def _uses_before(self, epoch: int) -> dict[int, int]:
        """Returns how many samples of each kind come before an epoch."""
        uses = [0] * len(self._known)  # Python's numbers, which do not overflow
        for turn, (views, in_epoch) in enumerate(self._sets):
            passes, rest = divmod(epoch * in_epoch, len(views))
            begun = numpy.zeros(len(uses), numpy.int64)
            if rest:
                begun = numpy.bincount(
                    self._kinds[turn][self._pass(turn, passes)[:rest]], minlength=len(uses)
                )
            for kind, (images, more) in enumerate(
                zip(self._counts[turn].tolist(), begun.tolist(), strict=True)
            ):
                uses[kind] += passes * images + more
        return dict(enumerate(uses))

    def _emitted_before(self, epoch: int) -> int:
        """Returns the number of micro-batches that are complete when an epoch begins."""
        return sum(uses // self._known[kind][1] for kind, uses in self._uses_before(epoch).items())

    def _last_epoch_before(self, micro_batch: int) -> int:
        """Returns the last epoch that begins with at most this many micro-batches complete, by bisection."""
        low, high = 0, 1
        while self._emitted_before(high) <= micro_batch:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._emitted_before(middle) <= micro_batch else (low, middle)
        return low

    def _waiting_before(self, epoch: int) -> defaultdict[int, list[_Use]]:
        """Rebuilds the queues at the beginning of an epoch: for each kind, its last few samples in the stream.

        The lengths follow from the counts, so walking the stream backwards until the queues are full is enough.
        """
        missing = {kind: uses % self._known[kind][1] for kind, uses in self._uses_before(epoch).items()}
        left = sum(missing.values())
        queues: defaultdict[int, list[_Use]] = defaultdict(list)
        while left:
            epoch -= 1
            for kind, *use in self._stream(epoch, backwards=True):
                if missing[kind]:
                    queues[kind].append((use[0], use[1], use[2]))
                    missing[kind] -= 1
                    left -= 1
                    if not left:
                        break
        for queue in queues.values():
            queue.reverse()
        return queues


def _numbered(
    views: Sequence[Sequence[View]], global_batch: BatchSize, numbers: dict[_Kind, int]
) -> NDArray[numpy.int32]:
    """Returns the number of each sample's kind in `numbers`, which gets new kinds."""
    if isinstance(views, ViewGroups):
        shapes = [((size,), batch_at(global_batch, cropping.resolution)) for cropping, size in views.shapes]
        table = [numbers.setdefault(kind, len(numbers)) for kind in shapes]
        return numpy.array(table, numpy.int32)[views.kinds]
    kinds = ((group[0].sizes, batch_at(global_batch, group[0].resolution)) for group in views)
    return numpy.fromiter((numbers.setdefault(kind, len(numbers)) for kind in kinds), numpy.int32)


def _spread(uses: Sequence[int]) -> NDArray[numpy.int16]:
    """Returns the set of each place in an epoch, evenly spread: use j of u comes at (j + 1/2) / u of the epoch."""
    times = numpy.concatenate([(numpy.arange(count) + 0.5) / count for count in uses])
    turns = numpy.repeat(numpy.arange(len(uses), dtype=numpy.int16), uses)
    return turns[numpy.argsort(times, kind="stable")]
