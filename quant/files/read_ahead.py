"""A model's tensors one after the other from disk to the device, with the next ones under way.

Files are read in chunks by several threads into pinned memory, from where copies to a GPU overlap with reading
and with what is done there. A mapped file would count in this process's memory page by page, and reads slower.
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
from halfbyte.quant.files.shards import ShardedWeights

FileRead = Callable[[Path, str], None]
"""Called with each file and its digest, as `file_digest` gives it, when all of it has been read."""

_SHRUNK = "became shorter while it was read; is it being written?"


@dataclass(frozen=True)
class _Part:
    """The bytes that a chunk holds of a tensor."""

    target: Tensor  # uint8, a slice of the tensor's bytes
    start: int  # in the chunk


@dataclass
class _Chunk:
    """One read, and what is to become of it."""

    descriptor: int
    path: Path
    start: int
    size: int
    parts: list[_Part] = field(default_factory=list)
    completes: list[str] = field(default_factory=list)  # tensors whose last byte is here
    ends_file: bool = False
    targets_ready: torch.cuda.Event | None = None


@dataclass(frozen=True)
class _Read:
    """A chunk that has been read, its copies at least queued."""

    digest: bytes | None
    copied: torch.cuda.Event | None


class _Lane:
    """One thread's buffers, of which one is filled while the other is copied from, and its stream."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        if on_gpu:
            # A new thread is at the first GPU, and pinned memory would make a context there.
            torch.cuda.set_device(device)
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self._buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def buffer(self) -> Tensor:
        """The other one of the two, when nothing is copied from it any longer."""
        self._turn = 1 - self._turn
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        return self._buffers[self._turn]

    def mark(self) -> torch.cuda.Event | None:
        """An event after the copies queued so far, which the buffer waits for before it is filled again."""
        if self.stream is None:
            return None
        self._copied[self._turn] = event = torch.cuda.Event()
        event.record(self.stream)
        return event


class ReadAhead:
    """Iterates over (name, tensor on its device) in the order of the files."""

    def __init__(
        self,
        weights: ShardedWeights,
        names: Collection[str],
        device: torch.device,
        *,
        on_host: Collection[str] = (),
        on_file: FileRead | None = None,
    ) -> None:
        """Reads `names` to `device`, those `on_host` to the host instead.

        With `on_file` every byte of the files is read and counts in their digests, also of other tensors.
        """
        self._weights = weights
        # A thread of its own has another current device.
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
        self._tensors: dict[str, Tensor] = {}  # uint8, the bytes of those under way
        self._lanes = threading.local()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Raises ValueError, naming the file, where one is shorter than its header says or cannot be read."""
        under_way: deque[tuple[_Chunk, Future[_Read]]] = deque()
        digests: list[bytes] = []
        with ExitStack() as stack:
            pool = ThreadPoolExecutor(READING_THREADS)
            stack.callback(pool.shutdown, cancel_futures=True)
            chunks = self._chunks(stack)
            while True:
                while len(under_way) < 2 * READING_THREADS and (chunk := next(chunks, None)) is not None:
                    under_way.append((chunk, pool.submit(self._read, chunk)))
                if not under_way:
                    return
                chunk, future = under_way.popleft()
                read = future.result()
                chunk.parts.clear()  # they keep the memory of their tensors
                if read.copied is not None:
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
        """The reads in order; a tensor is allocated when its first chunk is planned."""
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
                        # Memory for the tensors may still be in use by what was queued before.
                        chunk.targets_ready = torch.cuda.Event()
                        chunk.targets_ready.record(torch.cuda.current_stream(self._device))
                    yield chunk
            if left:
                raise ValueError(f"{path}: {_SHRUNK}")

    def _plan(self, chunk: _Chunk, left: deque[str]) -> None:
        """Notes which of the tensors `left` the chunk holds, and takes those away that end in it."""
        stop = chunk.start + chunk.size
        while left:
            name = left[0]
            stored = self._weights.stored(name)
            if stored.start >= stop:
                return
            if name not in self._tensors:
                place = "cpu" if name in self._on_host else self._device
                self._tensors[name] = torch.empty(stored.stop - stored.start, dtype=torch.uint8, device=place)
            first, last = max(stored.start, chunk.start), min(stored.stop, stop)
            if last > first:
                target = self._tensors[name][first - stored.start : last - stored.start]
                chunk.parts.append(_Part(target, first - chunk.start))
            if stored.stop > stop:
                return
            chunk.completes.append(left.popleft())

    def _finished(self, name: str) -> Tensor:
        stored = self._weights.stored(name)
        return self._tensors.pop(name).view(stored.dtype).view(stored.shape)

    def _read(self, chunk: _Chunk) -> _Read:
        """On one of the threads."""
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
            raise ValueError(f"{chunk.path}: cannot be read: {error.strerror}") from error
        if count == 0:
            raise ValueError(f"{chunk.path}: {_SHRUNK}")
        done += count
