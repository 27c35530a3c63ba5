"""How the packed bytes of a block get to the device: beside the computation on CUDA, at once elsewhere.

Marks are places in the order of work. `now` is one behind all that the computation has been given, `copy` gives one
behind the copy; a copy starts behind a mark of the computation, and the computation is told to wait for one of a copy.
Between them they are all that keeps a block from being read before it is there, and overwritten while it is read.
"""

import mmap
import weakref
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.trainer.errors import OutOfMemory


class PageLocked:
    """`bytes` (n,) uint8 in pages of its own, locked for as long as this lives where a CUDA device is to read them.

    torch's allocator of pinned memory rounds sizes up to powers of two, which would make 10 GB of FLUX's 5.7; pages
    that are registered afterwards are exactly those that are needed.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """Raises OutOfMemory where the system does not lock so much."""
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes: Tensor = torch.frombuffer(pages, dtype=torch.uint8)
        if device.type != "cuda":
            return
        # A forked process would get a copy of locked pages at once.
        pages.madvise(mmap.MADV_DONTFORK)
        place = self.bytes.data_ptr()
        with torch.cuda.device(device):
            error = int(torch.cuda.cudart().cudaHostRegister(place, nbytes, _PORTABLE))
        if error:
            raise OutOfMemory(
                f"train.stream_blocks: the system did not lock {nbytes / 2**20:.0f} MiB of host memory (CUDA error"
                f" {error}); all blocks together must fit into it, see halfbyte plan"
            )
        # At the end of the process the system does it, while copies may still be under way.
        weakref.finalize(self, _unlock, place, device).atexit = False


Mark = torch.cuda.Event | None
"""None: what it stands for has happened."""


class BlockCopies(Protocol):
    """One direction, from the host's memory to a device's."""

    def locked(self, nbytes: int) -> PageLocked:
        """Host memory to copy from."""
        ...

    def room(self, nbytes: int) -> Tensor:
        """Memory of the device to copy to, (nbytes,) uint8."""
        ...

    def now(self) -> Mark:
        """Behind everything that the computation has been given."""
        ...

    def copy(self, source: Tensor, target: Tensor, after: Mark) -> Mark:
        """Copies (n,) uint8 when `after` has been reached; the mark behind it."""
        ...

    def wait(self, arrived: Mark) -> None:
        """What the computation is given from now on runs behind `arrived`."""
        ...


class CudaCopies:
    """A stream of its own, beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def locked(self, nbytes: int) -> PageLocked:
        return PageLocked(nbytes, self._device)

    def room(self, nbytes: int) -> Tensor:
        room = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        # For the end of its life alone: a copy that nobody waited for may then still be under way.
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
    """Where the device is the host: a copy is done when it returns."""

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
    """What copies to a device of this kind."""
    return CudaCopies(device) if device.type == "cuda" else DirectCopies(device)


_PORTABLE = 1  # cudaHostRegisterPortable: locked for every context of the process


def _unlock(place: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(place)
