"""Streams a model's tensors from disk to the device, reading the next ones while the current one is used.

Several threads read the files in chunks into pinned memory. From there, copies to a GPU overlap with reading
and with the work on the device. A memory-mapped file would count in this process's memory page by page, and
is slower to read.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.quant.files.digest import CHUNK_BYTES, READING_THREADS, chunk_digest, combined
from halfbyte.quant.files.shards import SHRUNK, ShardedWeights

FileRead = Callable[[Path, str], None]
"""Called with each file and its `file_digest`, once all of the file has been read."""


@dataclass(frozen=True)
class _Part:
    """The bytes of one tensor that a chunk contains."""

    target: Tensor  # uint8, a slice of the tensor's bytes
    start: int  # offset in the chunk


@dataclass
class _Chunk:
    """One read, and the tensors that its bytes belong to."""

    descriptor: int
    path: Path
    start: int  # offset in the file
    size: int
    parts: list[_Part] = field(default_factory=list)
    completes: list[str] = field(default_factory=list)  # tensors whose last byte is in this chunk
    ends_file: bool = False
    targets_ready: torch.cuda.Event | None = None  # copies into the targets wait for it


@dataclass(frozen=True)
class _Read:
    """The result of reading a chunk: its copies to the device are queued, or done on the CPU."""

    digest: bytes | None
    copied: torch.cuda.Event | None  # fires after the copies


class _Lane:
    """The stream and the two buffers of one thread: one buffer is filled while the other is copied from."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        if on_gpu:
            # The current device of a new thread is the first GPU, and pinning memory would create a context
            # there.
            torch.cuda.set_device(device)
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self._buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def buffer(self) -> Tensor:
        """Switches to the other buffer, waits until the copies from it are done, and returns it."""
        self._turn = 1 - self._turn
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        return self._buffers[self._turn]

    def mark(self) -> torch.cuda.Event | None:
        """Records an event after the copies queued so far; `buffer` waits for it before a refill."""
        if self.stream is None:
            return None
        self._copied[self._turn] = event = torch.cuda.Event()
        event.record(self.stream)
        return event


class ReadAhead:
    """Iterates over (name, tensor on its device), in the order of the files."""

    def __init__(
        self,
        weights: ShardedWeights,
        names: Collection[str],
        device: torch.device,
        *,
        on_host: Collection[str] = (),
        on_file: FileRead | None = None,
    ) -> None:
        """Prepares to read `names` to `device`, and the names in `on_host` to the host instead.

        With `on_file`, every byte of the files is read, including other tensors, to compute the files'
        digests.
        """
        self._weights = weights
        # Resolves "cuda" to the caller's current device, which is a different one in the reading threads.
        self._device = (
            torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
        )
        self._on_host = frozenset(on_host)
        self._on_file = on_file
        self._in_file: dict[Path, list[str]] = {path: [] for path in weights.files}
        wanted = frozenset(names)
        for name in weights.names:
            if name in wanted:
                self._in_file[weights.path(name)].append(name)
        # uint8 tensors in flight: allocated with their first chunk, handed out and dropped with their last.
        self._tensors: dict[str, Tensor] = {}
        self._lanes = threading.local()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the tensors. Raises ValueError, naming the file, if it is too short or cannot be read."""
        in_flight: deque[tuple[_Chunk, Future[_Read]]] = deque()
        digests: list[bytes] = []
        with ExitStack() as stack:
            pool = ThreadPoolExecutor(READING_THREADS)
            stack.callback(pool.shutdown, cancel_futures=True)
            chunks = self._chunks(stack)
            while True:
                # Two chunks per thread: a thread that finishes one finds its next read in the queue.
                while len(in_flight) < 2 * READING_THREADS and (chunk := next(chunks, None)) is not None:
                    in_flight.append((chunk, pool.submit(self._read, chunk)))
                if not in_flight:
                    return
                chunk, future = in_flight.popleft()
                read = future.result()
                chunk.parts.clear()  # the slices keep their tensors' memory alive
                if read.copied is not None:
                    # The caller's stream, not the host, waits for the copies.
                    torch.cuda.current_stream(self._device).wait_event(read.copied)
                for name in chunk.completes:
                    yield name, self._finished(name)
                if self._on_file is not None:
                    assert read.digest is not None
                    digests.append(read.digest)
                    if chunk.ends_file:
                        self._on_file(chunk.path, combined(digests))
                        digests = []

    def _chunks(self, stack: ExitStack) -> Iterator[_Chunk]:
        """Yields the reads in order; a tensor is allocated when its first chunk is planned."""
        for path, names in self._in_file.items():
            descriptor = os.open(path, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            size = os.fstat(descriptor).st_size
            left = deque(names)
            for start in range(0, size, CHUNK_BYTES):
                chunk = _Chunk(descriptor, path, start, min(CHUNK_BYTES, size - start))
                chunk.ends_file = start + chunk.size == size
                self._plan(chunk, left)
                if chunk.parts or chunk.completes or self._on_file is not None:
                    if self._device.type == "cuda":
                        # The allocator may reuse memory that work queued earlier on this stream still reads,
                        # so the copies, which run on other streams, wait for that work.
                        chunk.targets_ready = torch.cuda.Event()
                        chunk.targets_ready.record(torch.cuda.current_stream(self._device))
                    yield chunk
            if left:
                raise ValueError(f"{path}: {SHRUNK}")

    def _plan(self, chunk: _Chunk, left: deque[str]) -> None:
        """Assigns the chunk's bytes to the tensors in `left`, and removes the tensors that end in it."""
        stop = chunk.start + chunk.size
        while left:
            name = left[0]
            stored = self._weights.stored(name)
            if stored.start >= stop:
                return
            if name not in self._tensors:
                device = "cpu" if name in self._on_host else self._device
                size = stored.stop - stored.start
                self._tensors[name] = torch.empty(size, dtype=torch.uint8, device=device)
            first, last = max(stored.start, chunk.start), min(stored.stop, stop)
            if last > first:
                target = self._tensors[name][first - stored.start : last - stored.start]
                chunk.parts.append(_Part(target, first - chunk.start))
            if stored.stop > stop:
                return
            chunk.completes.append(left.popleft())

    def _finished(self, name: str) -> Tensor:
        """Returns a completely read tensor in its dtype and shape."""
        stored = self._weights.stored(name)
        return self._tensors.pop(name).view(stored.dtype).view(stored.shape)

    def _read(self, chunk: _Chunk) -> _Read:
        """Reads a chunk and queues its copies to the device; runs on one of the pool's threads."""
        if not hasattr(self._lanes, "lane"):
            self._lanes.lane = _Lane(self._device)
        lane: _Lane = self._lanes.lane
        buffer = lane.buffer()[: chunk.size]
        data = buffer.numpy().data
        _read_into(data, chunk)
        digest = None if self._on_file is None else chunk_digest(data)
        with nullcontext() if lane.stream is None else torch.cuda.stream(lane.stream):
            if lane.stream is not None and chunk.targets_ready is not None:
                lane.stream.wait_event(chunk.targets_ready)
            for part in chunk.parts:
                part.target.copy_(buffer[part.start : part.start + part.target.numel()], non_blocking=True)
            return _Read(digest, lane.mark())


def _read_into(data: memoryview, chunk: _Chunk) -> None:
    done = 0
    while done < len(data):
        try:
            count = os.preadv(chunk.descriptor, [data[done:]], chunk.start + done)
        except OSError as error:
            raise ValueError(f"{chunk.path}: cannot read the file: {error.strerror}") from error
        if count == 0:
            raise ValueError(f"{chunk.path}: {SHRUNK}")
        done += count
