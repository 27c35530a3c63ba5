"""Memory that is held for nothing."""

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from halfbyte.trainer.errors import OutOfMemory


def free_unused(device: torch.device) -> None:
    """Gives memory back to the device that no tensor holds any longer."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# How cuBLAS and cuDNN, Triton and the driver say so.
_DEVICE_IS_FULL = re.compile(r"STATUS_ALLOC_FAILED|(CUDA|\[CUDA\]|driver)[^:\n]*: out of memory")

# How torch's allocator for the CPU does.
_HOST_IS_FULL = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory")

_HOST = (
    "the host ran out of memory, of which activations (train.gradient_checkpointing: offload), blocks"
    " (train.stream_blocks) and T5 (model.stream_text_encoder) take less where they stay on the device; halfbyte plan"
    " shows what each phase needs of it"
)


@contextmanager
def when_full(message: Callable[[], str]) -> Iterator[None]:
    """Raises OutOfMemory: with `message` where torch or its libraries find no memory on the device, and saying what
    takes less of it where there is none on the host."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory(_HOST) from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or _DEVICE_IS_FULL.search(str(error)):
            raise OutOfMemory(message()) from error
        if _HOST_IS_FULL.search(str(error)):
            raise OutOfMemory(_HOST) from error
        raise
