"""Copies packed weights from host memory to the device: on a side stream on CUDA, synchronously elsewhere.

A `Mark` is a point in a stream of work, a CUDA event. All synchronization consists of two rules:

    copy(source, target, after)   starts once the computation has passed `after`:
                                  no copy overwrites weights that a kernel still reads
    wait(arrived)                 makes later kernels wait for a copy's mark:
                                  no kernel reads weights that have not arrived
"""

import mmap
import weakref
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.trainer.errors import OutOfMemory


class PageLocked:
    """Host memory `bytes` (n,) uint8, page-locked for a CUDA device until this object is garbage collected.

    torch's allocator of pinned memory rounds sizes up to powers of two, which would turn FLUX's 5.7 GB into
    10 GB. Here pages are allocated first and registered with CUDA afterwards: exactly the needed pages.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """Raises OutOfMemory if the system cannot lock that much memory."""
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes: Tensor = torch.frombuffer(pages, dtype=torch.uint8)
        if device.type != "cuda":
            return
        # A fork (a data loader's worker, say) would copy locked pages immediately instead of on write.
        pages.madvise(mmap.MADV_DONTFORK)
        place = self.bytes.data_ptr()
        with torch.cuda.device(device):
            error = int(torch.cuda.cudart().cudaHostRegister(place, nbytes, _PORTABLE))
        if error:
            raise OutOfMemory(
                f"train.stream_blocks: got true, but the system could not lock {nbytes / 2**20:.0f} MiB of"
                f" host memory (CUDA error {error}); expected enough lockable memory for all blocks together."
                " Run `halfbyte plan` to see how much that is"
            )
        # Not at exit: copies may still be running, and the system unlocks the pages of a dead process anyway.
        weakref.finalize(self, _unlock, place, device).atexit = False


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
        return PageLocked(nbytes, self._device)

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
        return PageLocked(nbytes, self._device)

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


_PORTABLE = 1  # cudaHostRegisterPortable: locked for every context of the process


def _unlock(place: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(place)
