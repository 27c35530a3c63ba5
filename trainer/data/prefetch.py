"""Reads the next batches in a thread while the device computes, so that a step does not wait for them."""

import threading
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import Any

import torch
from torch.utils.data import DataLoader

_BATCHES = 4  # read ahead
_PAUSE = 0.1  # seconds after which the thread looks whether it is still wanted


class PrefetchingLoader(DataLoader[Any]):
    """A DataLoader that reads ahead in a thread.

    A thread rather than worker processes: reading, checksums and copies do not hold Python's lock, and handing batches
    over from a process would take longer than reading them. The order of the batches is that of the sampler. `close`
    ends the thread.
    """

    def __init__(self, dataset: Any, *, device: torch.device, **options: Any) -> None:
        """`device` is that of the training; batches are in page-locked memory if it is a CUDA device."""
        super().__init__(dataset, pin_memory=device.type == "cuda", **options)
        self._device = device
        self._reader: _Reader | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yields the batches. Raises the errors of reading them."""
        self.close()
        reader = self._reader = _Reader(super().__iter__(), self._device)
        return iter(reader)

    def close(self) -> None:
        """Ends the thread of the last iteration."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class _Reader:
    """One pass over the batches, in a thread."""

    def __init__(self, batches: Iterator[Any], device: torch.device) -> None:
        self._batches = batches
        self._device = device
        self._queue: Queue[tuple[Any, BaseException | None] | None] = Queue(_BATCHES)
        self._closing = threading.Event()
        # A daemon, in case nobody calls `close`.
        self._thread = threading.Thread(target=self._read, name="halfbyte: data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Any]:
        while (found := self._queue.get()) is not None:
            batch, error = found
            if error is not None:
                raise error
            yield batch

    def close(self) -> None:
        """Ends the thread, and forgets the batches that it has read."""
        self._closing.set()
        while self._thread.is_alive():
            with suppress(Empty):
                self._queue.get(timeout=_PAUSE)
        self._thread.join()

    def _read(self) -> None:
        if self._device.type == "cuda":
            # The device is set for each thread. Without this one, the thread would take memory of the first device.
            torch.cuda.set_device(self._device)
        try:
            for batch in self._batches:
                if not self._put((batch, None)):
                    return
        except BaseException as error:
            self._put((None, error))
        else:
            self._put(None)

    def _put(self, found: tuple[Any, BaseException | None] | None) -> bool:
        """Hands a batch over; returns False if nobody wants it anymore."""
        while not self._closing.is_set():
            try:
                self._queue.put(found, timeout=_PAUSE)
            except Full:
                continue
            return True
        return False
