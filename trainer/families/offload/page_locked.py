"""Host memory that a device copies from while it computes."""

import mmap
import weakref

import torch
from torch import Tensor

from halfbyte.trainer.errors import OutOfMemory

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every context of the process


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


def _unlock(place: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(place)
