"""How the packed bytes of a block get to the device: beside the computation on CUDA, at once elsewhere.

Marks are places in the order of work. `now` is one behind all that the computation has been given, `copy` gives one
behind the copy; a copy starts behind a mark of the computation, and the computation is told to wait for one of a copy.
Between them they are all that keeps a block from being read before it is there, and overwritten while it is read.
"""

from typing import Protocol

import torch
from torch import Tensor

from halfbyte.trainer.families.offload.page_locked import PageLocked

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
