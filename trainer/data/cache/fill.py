"""Makes the missing entries of a cache: prepares items, encodes them in batches and writes them, all at once.

Every batch of a group has the same size; the last one is filled up with copies of its last item. Convolutions, norms,
softmax and matrix products compute the rows of a batch from nothing but these rows, so that an entry does not depend on
the other items of its batch, only on the batch's size. That is tested on the CPU
(tests/trainer/families/test_encoder_batches.py); on CUDA, `scripts.bench.data.batches` has still to show it. Other
sizes change the last bits, like another card does. LLM.int8() is the exception, whose outlier columns are those of the
whole batch: its batches have one item. A batch is halved, with a warning, only if the device has no memory for it.
"""

import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from halfbyte.trainer.data.cache.entry_cache import EntryCache
from halfbyte.trainer.data.cache.shard import ShardWriter
from halfbyte.trainer.errors import DiskError
from halfbyte.trainer.runtime.progress import OnProgress
from halfbyte.trainer.runtime.sizes import file_size
from halfbyte.trainer.runtime.workers import mapped

log = logging.getLogger(__name__)

_Item = TypeVar("_Item")
_Ready = TypeVar("_Ready")

Groups = Sequence[tuple[Sequence[_Item], int]]
"""Items that can be encoded together, each with the size of their batches."""

_REPORTED = 200  # entries from which the log says where the time went
_WAITING = 32  # entries that may wait for the disk
_WRITERS = 2  # threads: one packs and checks 150 captions of 4 MB in a second, hardly more than a GPU encodes


@dataclass
class Times:
    """Where the time of encoding went, in seconds."""

    kind: str
    entries: int = 0
    whole: float = 0.0
    items: float = 0.0  # waiting for decoded images
    encoder: float = 0.0
    first: float = 0.0  # the encoder's first batch, which loads the model
    disk: float = 0.0  # waiting for the disk

    def __str__(self) -> str:
        return (
            f"encoded {self.entries:,} {self.kind} in {self.whole:.0f} s"
            f" ({self.entries / max(self.whole, 1e-9):.1f}/s): {self._share(self.first)} loading the encoder and its"
            f" first batch, {self._share(self.encoder)} encoding, {self._share(self.items)} waiting for decoded images,"
            f" {self._share(self.disk)} waiting for the disk"
        )

    def _share(self, seconds: float) -> str:
        return f"{seconds / max(self.whole, 1e-9):.0%}"


@dataclass
class Filling:
    """The progress of filling the cache, over all kinds of entries."""

    folder: Path
    total: int  # entries of this process, with those that are there
    processes: int
    progress: OnProgress | None
    done: int = 0
    times: list[Times] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.count(0)

    def count(self, entries: int = 1) -> None:
        """Reports that this many more entries are there."""
        self.done += entries
        if self.progress is not None:
            self.progress(self.done, self.total)

    def report(self) -> None:
        """Logs where the time went, if there was much to encode."""
        for times in self.times:
            if times.entries >= _REPORTED:
                log.info("%s", times)

    def check_space(self, written: int, entries: int, left: int) -> None:
        """Raises DiskError if the disk has no room for what is left, at the size of the entries so far."""
        needed = written * left * self.processes // max(entries, 1)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise DiskError(
                f"the cache {self.folder} needs {file_size(needed)} more, but its disk has only {file_size(free)} free;"
                " set data.cache_dir to a folder on a larger disk"
            )


def fill(
    cache: EntryCache[_Item],
    groups: Groups[_Item],
    prepare: Callable[[_Item], _Ready],
    encode: Callable[[Sequence[_Ready]], Sequence[Mapping[str, Tensor]]],
    filling: Filling,
    *,
    maker: str,
    workers: int,
) -> None:
    """Makes the entries of all items in `groups`.

    Args:
        prepare: makes of an item what `encode` takes; runs in `workers` processes, or in this one if there are none.
        encode: returns the tensors of each entry of a batch.
        maker: names the encoder in messages.

    Raises:
        DataError: an image changed, or an encoder's output is not finite.
        DiskError: the disk is too small or full.
        OutOfMemory: a worker was killed.
    """
    times = Times(cache.kind)
    filling.times.append(times)
    began = time.perf_counter()
    items = [item for group, _ in groups for item in group]
    ready = mapped(prepare, items, workers=workers, doing="decoding images")
    try:
        with _Writing(cache, maker) as writing:
            for encoded in _one_behind(_encoded(groups, ready, _Batches(encode), times)):
                with _clock(times, "encoder" if times.entries else "first"):
                    encoded.wait()
                with _clock(times, "disk"):
                    for item, row in zip(encoded.batch, encoded.rows, strict=True):
                        writing.add(item, row)
                times.entries += len(encoded.batch)
                if times.entries == len(encoded.batch):
                    filling.check_space(writing.wait(), times.entries, len(items) - times.entries)
                filling.count(len(encoded.batch))
    finally:
        ready.close()
        times.whole = time.perf_counter() - began


@dataclass(frozen=True)
class _Encoded(Generic[_Item]):
    """A batch with the tensors of its entries in host memory."""

    batch: Sequence[_Item]
    rows: Sequence[Mapping[str, Tensor]]
    copied: torch.cuda.Event | None  # after which the tensors are complete; None: they are

    def wait(self) -> None:
        """Waits until the tensors are complete."""
        if self.copied is not None:
            self.copied.synchronize()


def _encoded(
    groups: Groups[_Item], ready: Iterator[_Ready], encoder: "_Batches[_Ready]", times: Times
) -> Iterator[_Encoded[_Item]]:
    """Encodes the batches of all groups; `ready` are the prepared items, in the same order."""
    for group, size in groups:
        for batch in _batches(group, size):
            with _clock(times, "items"):
                prepared = list(islice(ready, len(batch)))
            with _clock(times, "encoder" if times.entries else "first"):
                encoded = _on_host(batch, encoder.rows(prepared, size))
            yield encoded


def _one_behind(batches: Iterator[_Encoded[_Item]]) -> Iterator[_Encoded[_Item]]:
    """Yields batches that a device copies when it has the next one to encode; complete ones at once."""
    before: _Encoded[_Item] | None = None
    for encoded in batches:
        if before is not None:
            yield before
        before = encoded
        if encoded.copied is None:
            yield encoded
            before = None
    if before is not None:
        yield before


def _on_host(batch: Sequence[_Item], rows: Sequence[Mapping[str, Tensor]]) -> _Encoded[_Item]:
    """Copies the tensors of a batch to the host. From a CUDA device the copies are only queued."""
    device = next(iter(rows[0].values())).device
    if device.type != "cuda":
        return _Encoded(batch, rows, None)
    copies = [
        {
            name: torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            for name, tensor in row.items()
        }
        for row in rows
    ]
    return _Encoded(batch, copies, torch.cuda.current_stream(device).record_event())


@contextmanager
def _clock(times: Times, part: str) -> Iterator[None]:
    """Adds the seconds of the context to a part of the times."""
    began = time.perf_counter()
    try:
        yield
    finally:
        setattr(times, part, getattr(times, part) + time.perf_counter() - began)


class _Batches(Generic[_Ready]):
    """Encodes batches of fixed sizes; of half the size from the first time that the device is full."""

    def __init__(self, encode: Callable[[Sequence[_Ready]], Sequence[Mapping[str, Tensor]]]) -> None:
        self._encode = encode
        self._most: int | None = None

    def rows(self, items: Sequence[_Ready], size: int) -> list[Mapping[str, Tensor]]:
        """Returns the tensors of each item's entry."""
        while True:
            limited = size if self._most is None else min(size, self._most)
            try:
                return [row for batch in _batches(items, limited) for row in self._filled(batch, limited)]
            except torch.OutOfMemoryError:
                if limited == 1:
                    raise
                self._most = limited // 2
            # Not inside of the handler, whose traceback holds the batch's tensors.
            torch.cuda.empty_cache()
            log.warning("the device has no memory for %d entries at once; encoding %d", limited, self._most)

    def _filled(self, batch: Sequence[_Ready], size: int) -> Sequence[Mapping[str, Tensor]]:
        return self._encode([*batch, *[batch[-1]] * (size - len(batch))])[: len(batch)]


class _Writing(AbstractContextManager["_Writing[Any]"], Generic[_Item]):
    """Writes entries in threads. The end of the context waits for them, and completes the last shard."""

    def __init__(self, cache: EntryCache[_Item], maker: str) -> None:
        self._cache = cache
        self._maker = maker
        self._threads = ThreadPoolExecutor(_WRITERS, thread_name_prefix="halfbyte: cache")
        self._writer = ShardWriter(cache.shards)
        self._waiting: deque[Future[int]] = deque()
        self._written = 0

    def add(self, item: _Item, tensors: Mapping[str, Tensor]) -> None:
        """Hands an entry over; waits if too many are waiting. Raises an error of an earlier one."""
        while len(self._waiting) >= _WAITING:
            self._take()
        self._waiting.append(self._threads.submit(self._write, item, tensors))

    def wait(self) -> int:
        """Waits until all entries are written, and returns the bytes that they take."""
        while self._waiting:
            self._take()
        return self._written

    def _take(self) -> None:
        self._written += self._waiting.popleft().result()

    def _write(self, item: _Item, tensors: Mapping[str, Tensor]) -> int:
        return self._writer.add(*self._cache.pack(item, tensors, self._maker))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        # After an error too: what was encoded before it is kept.
        with self._writer, self._threads:
            if error is None:
                self.wait()


def _batches(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
