"""Releases cached memory, and turns out-of-memory failures into OutOfMemory errors with advice."""

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from halfbyte.trainer.errors import OutOfMemory


def free_unused(device: torch.device) -> None:
    """Releases cached memory: collects garbage, then returns the memory of freed tensors to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int | None:
    """Returns the memory of a CUDA device that this process may still take; None for other devices."""
    if device.type != "cuda":
        return None
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total_bytes(device)
    return min(int(torch.cuda.mem_get_info(device)[0]), int(allowed) - torch.cuda.memory_reserved(device))


def total_bytes(device: torch.device) -> int:
    """Returns the memory of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).total_memory)


# Out-of-memory messages of cuBLAS, cuDNN, Triton and the driver.
_DEVICE_IS_FULL = re.compile(r"STATUS_ALLOC_FAILED|(CUDA|\[CUDA\]|driver)[^:\n]*: out of memory")

# Out-of-memory messages of torch's CPU allocator.
_HOST_IS_FULL = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory")

_HOST = (
    "the host ran out of memory. To reduce host memory, keep on the device what these settings move to the host:"
    " activations (train.gradient_checkpointing: offload), blocks (train.stream_blocks) and T5"
    " (model.stream_text_encoder). `halfbyte plan` shows how much host memory each phase needs"
)


@contextmanager
def when_full(message: Callable[[], str]) -> Iterator[None]:
    """Turns an out-of-memory failure in the block into OutOfMemory.

    Raises:
        OutOfMemory: The device is full, with the text of `message()`; or the host is full, with the settings
            that reduce host memory.
    """
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
