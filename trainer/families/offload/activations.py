"""Keeps the blocks' inputs in host memory between forward and backward, copied while the device computes.

The device does not need a block's inputs between its forward and its backward. `put` starts the copy to the
host as soon as the block's forward has been launched. The backward visits the blocks in reverse, so `get`
also starts the copies back of the tensors that were put before. For dual blocks, whose two streams are put
and fetched together:

    computes    forward 1   forward 2   forward 3   backward 3          backward 2   backward 1
    copies                  put 1       put 2       put 3, fetch 3, 2   fetch 1

All copies of a device run on one side stream, in the order in which they were issued. That order is what
makes it safe to reuse a host buffer, see `HostStore.give_back`.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_PREFETCH = 2  # tensors fetched early: the two streams of a dual block


class Held:
    """One tensor in host memory. Its buffer returns to the store when this object is garbage collected."""

    def __init__(
        self, store: "HostStore", buffer: Tensor, device: torch.device, before: "Held | None"
    ) -> None:
        self._store = store
        self._buffer = buffer
        self._device = device
        # Weak, so that a chain of all puts does not keep the buffers of finished steps.
        self._before = None if before is None else weakref.ref(before)
        # The copy on its way to the device, and the event that ends it. Set by `fetch`, taken by `get`.
        self._fetched: tuple[Tensor, Any] | None = None
        weakref.finalize(self, store.give_back, buffer)

    def get(self) -> Tensor:
        """Returns the tensor on its device. Each call makes a new copy, so a second backward works too."""
        self.fetch()
        assert self._fetched is not None
        # Only the caller holds the device copy now; the host buffer stays valid for another `get`.
        tensor, arrived = self._fetched
        self._fetched = None
        # Start the copies that the next block's backward will ask for, while this block's backward computes.
        before = self.before
        for _ in range(_PREFETCH):
            if before is not None:
                before.fetch()
                before = before.before
        if arrived is not None:
            # The computation waits on the device; the CPU goes on launching.
            torch.cuda.current_stream(self._device).wait_event(arrived)
        return tensor

    @property
    def before(self) -> "Held | None":
        """The tensor that was put before this one; None if nothing needs it anymore."""
        return None if self._before is None else self._before()

    def fetch(self) -> None:
        """Starts the copy to the device, unless it has been started."""
        if self._fetched is None:
            self._fetched = self._store.copy_back(self._buffer, self._device)


class HostStore:
    """Page-locked host buffers for one model's blocks, reused from step to step."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}  # buffers without an owner
        self._last: weakref.ref[Held] | None = None  # the last tensor put, `before` of the next one
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def put(self, tensor: Tensor) -> Held:
        """Starts copying `tensor` to the host.

        Its device memory can be reused once the copy is done and nobody holds the tensor.
        """
        kept = self._free.get((tensor.shape, tensor.dtype))
        if kept:
            buffer = kept.pop()
        else:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        if tensor.is_cuda:
            stream = self._stream(tensor.device)
            # The copy must see what the kernels launched before now write into `tensor`.
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                buffer.copy_(tensor, non_blocking=True)
            # The allocator gives the tensor's memory away only after the copy has read it.
            tensor.record_stream(stream)
        else:
            buffer.copy_(tensor)
        held = Held(self, buffer, tensor.device, None if self._last is None else self._last())
        self._last = weakref.ref(held)
        return held

    def copy_back(self, buffer: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """Returns a device tensor and the event after which it holds the buffer's values (CPU: None)."""
        if device.type != "cuda":
            return buffer.clone(), None
        stream = self._stream(device)
        tensor = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        # `empty` may return memory that kernels on the current stream still read: the copy must come after.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            tensor.copy_(buffer, non_blocking=True)
            arrived = stream.record_event()
        # If nobody waits for `arrived` and the tensor is dropped, its memory must outlive the copy.
        tensor.record_stream(stream)
        return tensor, arrived

    def give_back(self, buffer: Tensor) -> None:
        """Takes back a buffer for the next `put`.

        A copy may still be reading it. The next write into it is a later copy on the same stream, so it comes
        after.
        """
        self._free.setdefault((buffer.shape, buffer.dtype), []).append(buffer)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def save(
    ctx: Any, streams: Sequence[Tensor], others: Sequence[Tensor | None], store: HostStore | None
) -> None:
    """Saves tensors for a backward: `streams` in host memory if there is a store, `others` on the device."""
    ctx.held = None if store is None else [store.put(stream) for stream in streams]
    ctx.streams = len(streams)
    ctx.save_for_backward(*(() if store is not None else streams), *others)


def saved(ctx: Any) -> tuple[list[Tensor], list[Any]]:
    """Returns (streams, others) as they were given to `save`."""
    tensors = list(ctx.saved_tensors)
    if ctx.held is None:
        return tensors[: ctx.streams], tensors[ctx.streams :]
    # Last put, first fetched: `get` prefetches the tensor that was put before.
    return [held.get() for held in reversed(ctx.held)][::-1], tensors
