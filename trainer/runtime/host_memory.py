"""Host memory for copies of tensors that a thread reads while the device goes on; page-locked for CUDA."""

import mmap
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.trainer.errors import OutOfMemory

_ALIGNMENT = 256  # bytes; more than any dtype needs
_PORTABLE = 1  # cudaHostRegisterPortable: locked for every context of the process


class PageLocked:
    """Host memory `bytes` (n,) uint8, page-locked for a CUDA device until this object is garbage collected.

    torch's allocator of pinned memory rounds sizes up to powers of two, which would turn FLUX's 5.7 GB into
    10 GB. Here pages are allocated first and registered with CUDA afterwards: exactly the needed pages.
    """

    def __init__(self, nbytes: int, device: torch.device, refusal: str) -> None:
        """Raises OutOfMemory if the system cannot lock that much memory; `refusal` begins its message."""
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
                f"{refusal}the system could not lock {nbytes / 2**20:.0f} MiB of host memory (CUDA error {error});"
                " expected enough lockable memory. Run `halfbyte plan` to see how much the run takes"
            )
        # Not at exit: copies may still be running, and the system unlocks the pages of a dead process anyway.
        weakref.finalize(self, _unlock, place, device).atexit = False


class HostCopies:
    """Copies tensors into one block of host memory, which is used again for the next copies.

    Allocating and locking a gigabyte takes longer than copying it, so the block is kept.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._block: PageLocked | None = None
        self._used = 0

    def reserve(self, nbytes: int) -> None:
        """Makes room for `nbytes` (see `size_of`) and forgets all copies, whose memory is used again.

        Raises:
            OutOfMemory: the system cannot lock that much memory.
        """
        self._used = 0
        if self._block is None or len(self._block.bytes) < nbytes:
            self._block = None  # frees the old block first
            self._block = PageLocked(nbytes, self._device, "checkpoints: ")
            self._block.bytes.zero_()  # now, because the first write to each page is slow

    def copies(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns copies of the tensors on the host; on CUDA they are complete once `mark` is.

        The copies are queued on the stream of the step, so what the step's next kernels write is not in them. Other
        streams could copy in parallel to the next step, but would have to hold back its update; a gigabyte takes
        20 to 40 ms.
        """
        assert self._block is not None
        found = {}
        for name, tensor in tensors.items():
            room = self._block.bytes[self._used : self._used + tensor.nbytes]
            self._used += _aligned(tensor.nbytes)
            copy = room.view(tensor.dtype).view(tensor.shape)
            found[name] = copy.copy_(tensor.detach(), non_blocking=True)
        return found

    def mark(self) -> torch.cuda.Event | None:
        """Returns the event after all copies so far; None where they are complete."""
        if self._device.type != "cuda":
            return None
        return torch.cuda.current_stream(self._device).record_event()


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Returns the bytes that copies of the tensors take."""
    return sum(_aligned(tensor.nbytes) for tensor in tensors.values())


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _unlock(place: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(place)
