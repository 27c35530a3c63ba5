"""Streams that wait in the host's memory for the backward, copied beside the computation.

Between forward and backward a block's inputs are of no use to the device. Each is copied out as soon as its block has
read it, and back while the block behind it is in its backward: the last that went out is the first to come back, so
each fetch starts the next one.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_AHEAD = 2  # a dual block's two streams


class Held:
    """A tensor (any shape) in host memory."""

    def __init__(
        self, store: "HostStore", buffer: Tensor, device: torch.device, before: "Held | None"
    ) -> None:
        self._store = store
        self._buffer = buffer
        self._device = device
        self._before = None if before is None else weakref.ref(before)
        self._fetched: tuple[Tensor, Any] | None = None
        weakref.finalize(self, store.give_back, buffer)

    def get(self) -> Tensor:
        """The tensor on its device again; may be called more than once."""
        self.fetch()
        assert self._fetched is not None
        tensor, arrived = self._fetched
        self._fetched = None
        before = self.before
        for _ in range(_AHEAD):
            if before is not None:
                before.fetch()
                before = before.before
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)
        return tensor

    @property
    def before(self) -> "Held | None":
        """What went out before this one, if anybody still waits for it."""
        return None if self._before is None else self._before()

    def fetch(self) -> None:
        """Starts the way back, if it has not."""
        if self._fetched is None:
            self._fetched = self._store.copy_back(self._buffer, self._device)


class HostStore:
    """The host memory of one model's blocks, page-locked and used again from step to step."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._last: weakref.ref[Held] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def put(self, tensor: Tensor) -> Held:
        """Starts copying `tensor` out; its device memory is free for others once that is done and nobody holds it."""
        kept = self._free.get((tensor.shape, tensor.dtype))
        if kept:
            buffer = kept.pop()
        else:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        if tensor.is_cuda:
            stream = self._stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                buffer.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
        else:
            buffer.copy_(tensor)
        held = Held(self, buffer, tensor.device, None if self._last is None else self._last())
        self._last = weakref.ref(held)
        return held

    def copy_back(self, buffer: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """A tensor on the device, and the event after which it holds the buffer's values (None on the CPU)."""
        if device.type != "cuda":
            return buffer.clone(), None
        stream = self._stream(device)
        tensor = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        # The memory may have belonged to something that the current stream has still to read.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            tensor.copy_(buffer, non_blocking=True)
            arrived = stream.record_event()
        tensor.record_stream(stream)
        return tensor, arrived

    def give_back(self, buffer: Tensor) -> None:
        """Takes a buffer for the next `put`; whatever still reads it is ahead in the one stream that copies."""
        self._free.setdefault((buffer.shape, buffer.dtype), []).append(buffer)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def save(
    ctx: Any, streams: Sequence[Tensor], others: Sequence[Tensor | None], store: HostStore | None
) -> None:
    """Keeps tensors for a backward: `streams` in host memory where there is a store, `others` where they are."""
    ctx.held = None if store is None else [store.put(stream) for stream in streams]
    ctx.streams = len(streams)
    ctx.save_for_backward(*(() if store is not None else streams), *others)


def saved(ctx: Any) -> tuple[list[Tensor], list[Any]]:
    """(streams, others) as `save` took them."""
    tensors = list(ctx.saved_tensors)
    if ctx.held is None:
        return tensors[: ctx.streams], tensors[ctx.streams :]
    # Backwards, as they are fetched.
    return [held.get() for held in reversed(ctx.held)][::-1], tensors
