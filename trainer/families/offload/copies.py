"""Copies packed weights from host memory to the device: on a side stream on CUDA, synchronously elsewhere.

A `Mark` is a point in a stream of work, a CUDA event. All synchronization consists of two rules:

    copy(source, target, after)   starts once the computation has passed `after`:
                                  no copy overwrites weights that a kernel still reads
    wait(arrived)                 makes later kernels wait for a copy's mark:
                                  no kernel reads weights that have not arrived
"""

from typing import Protocol

import torch
from torch import Tensor

from halfbyte.trainer.runtime.host_memory import PageLocked

_REFUSAL = "train.stream_blocks: got true, but "


Mark = torch.cuda.Event | None
"""A point in a stream of work; None: the device has already passed it."""


class BlockCopies(Protocol):
    """Copies in one direction, from host memory to a device."""

    def locked(self, nbytes: int) -> PageLocked:
        """Allocates host memory to copy from."""
        ...

    def room(self, nbytes: int) -> Tensor:
        """Allocates device memory to copy to, (nbytes,) uint8."""
        ...

    def now(self) -> Mark:
        """Returns the mark after all kernels launched so far."""
        ...

    def copy(self, source: Tensor, target: Tensor, after: Mark) -> Mark:
        """Copies (n,) uint8 once the computation has passed `after`; returns the mark at its end."""
        ...

    def wait(self, arrived: Mark) -> None:
        """Makes every kernel launched from now on wait for `arrived`."""
        ...


class CudaCopies:
    """Copies on a side stream, in parallel with the stream that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def locked(self, nbytes: int) -> PageLocked:
        return PageLocked(nbytes, self._device, _REFUSAL)

    def room(self, nbytes: int) -> Tensor:
        room = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        # Matters only when the memory is freed: a prefetched copy that nobody waited for may still be running
        # then.
        room.record_stream(self._stream)
        return room

    def now(self) -> Mark:
        return torch.cuda.current_stream(self._device).record_event()

    def copy(self, source: Tensor, target: Tensor, after: Mark) -> Mark:
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, arrived: Mark) -> None:
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)


class DirectCopies:
    """Synchronous copies, for devices other than CUDA. Every mark is None."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def locked(self, nbytes: int) -> PageLocked:
        return PageLocked(nbytes, self._device, _REFUSAL)

    def room(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def now(self) -> Mark:
        return None

    def copy(self, source: Tensor, target: Tensor, after: Mark) -> Mark:
        target.copy_(source)
        return None

    def wait(self, arrived: Mark) -> None:
        pass


def copies_to(device: torch.device) -> BlockCopies:
    """Returns the copies for a device of this type."""
    return CudaCopies(device) if device.type == "cuda" else DirectCopies(device)
