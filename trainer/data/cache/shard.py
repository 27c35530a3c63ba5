"""Shards: files that hold many entries, one after the other, each with a header and a checksum.

A shard has one writer, a process that chose its name, and is only appended to. It is valid up to its last intact entry
at any time, so a process that is killed loses only the entry that it was writing, and no locks are needed, which
network file systems may lack. When a shard is complete its writer adds an index file. A shard without an index, or one
that has grown since, is scanned; the index can always be made from the shard.
"""

import os
import secrets
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from halfbyte.quant.files.atomic import flush, make_folder, write_file
from halfbyte.trainer.data.cache.entry import DamagedEntry
from halfbyte.trainer.errors import DiskError

SHARD = ".shard"
INDEX = ".index"
SHARD_BYTES = 10**9
"""A writer begins another shard when one has this size."""

KEY_BYTES = 32
_MAGIC = b"hbentry1"
# Magic, key, bytes of the payload, its CRC-32, and the CRC-32 of the header up to there; little-endian.
_HEADER = struct.Struct(f"<8s{KEY_BYTES}sQII")
HEADER_BYTES = _HEADER.size
_BODY = HEADER_BYTES - 4
_INDEX_KEY = bytes(KEY_BYTES)
_SYNC_SECONDS = 15.0
"""Entries are flushed to the disk this often. A killed process loses nothing that it has written; a machine may."""
_ABANDONED = 60.0  # seconds without a change after which a shard's writer is taken for dead
_WINDOW = 2**24  # bytes that a scan searches at a time after damage

_ROW = np.dtype([("key", "u1", (KEY_BYTES,)), ("offset", "<u8"), ("length", "<u8")])


@dataclass(frozen=True)
class Entries:
    """The places of a shard's entries."""

    rows: NDArray[np.void]  # of _ROW: key, offset of the header and length of the payload in bytes
    covered: int  # bytes of the shard that were looked at


class ShardWriter:
    """Appends entries to shards of its own in a folder. A context manager, whose end completes the last shard.

    Several threads may add entries: their checksums are computed in parallel.
    """

    def __init__(self, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._path = folder  # of the open shard
        self._file: int | None = None  # opened for the first entry, so that no shard is empty
        self._rows: list[tuple[bytes, int, int]] = []
        self._size = 0
        self._synced = 0.0
        self._lock = threading.Lock()

    def add(self, key: bytes, payload: bytes) -> int:
        """Appends an entry and returns its bytes on the disk. Raises DiskError if it cannot be written."""
        header = _header(key, payload)
        with self._lock:
            try:
                if self._file is None:
                    self._open()
                assert self._file is not None
                self._append(self._file, header, payload)
                if time.monotonic() - self._synced > _SYNC_SECONDS:
                    os.fsync(self._file)
                    self._synced = time.monotonic()
            except OSError as error:
                raise _disk_error(self._folder, error) from error
            self._rows.append((key, self._size, len(payload)))
            self._size += len(header) + len(payload)
            if self._size >= self._shard_bytes:
                self.close()
        return len(header) + len(payload)

    def close(self) -> None:
        """Completes the open shard: flushes it to the disk, and writes its index."""
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            try:
                os.fsync(file)
            finally:
                os.close(file)
            flush(self._folder)
        except OSError as error:
            raise _disk_error(self._folder, error) from error
        write_index(self._path, Entries(_as_rows(self._rows), self._size))

    def _open(self) -> None:
        make_folder(self._folder)
        # In the order of time, so that readers prefer an entry that was written later.
        self._path = self._folder / f"{time.time_ns():016x}-{secrets.token_hex(6)}{SHARD}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self._path, flags, 0o666)
        self._rows, self._size, self._synced = [], 0, time.monotonic()

    def _append(self, file: int, *parts: bytes) -> None:
        try:
            for part in parts:
                rest = memoryview(part)
                while rest:
                    rest = rest[os.write(file, rest) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(file, self._size)  # a part of an entry would end every scan here
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def read_payload(path: Path, key: bytes, offset: int, length: int) -> bytes:
    """Reads an entry and verifies its checksum.

    Raises:
        OSError: the shard cannot be read.
        DamagedEntry: the entry is not what was written.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = _at(file, offset, HEADER_BYTES)
        payload = _at(file, offset + HEADER_BYTES, length)
    finally:
        os.close(file)
    if len(payload) < length:
        raise DamagedEntry("it is cut off")
    if header != _header(key, payload):
        raise DamagedEntry("its checksum does not match")
    return payload


def entries_of(path: Path, *, after: int = 0) -> Entries:
    """Returns the entries of a shard from the byte `after`: those of its index, and those written since.

    Entries of the index are not read. Others are verified, because their writer may have been killed, or may be
    writing now. Writes an index for a shard without one, if nobody has written to it for a minute.

    Raises:
        OSError: the shard cannot be read.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        state = os.fstat(file)
        known = _read_index(path, state.st_size)
        if known is None or known.covered < after:
            known = Entries(np.empty(0, _ROW), after)
        rows = known.rows[known.rows["offset"] >= after]
        if known.covered >= state.st_size:
            return Entries(rows, known.covered)
        found, covered = [], known.covered
        for key, offset, length in _scan(file, known.covered, state.st_size):
            found.append((key, offset, length))
            covered = offset + HEADER_BYTES + length
    finally:
        os.close(file)
    rows = np.concatenate([rows, _as_rows(found)])
    if after == 0 and time.time() - state.st_mtime > _ABANDONED:
        write_index(path, Entries(rows, state.st_size))
        covered = state.st_size
    return Entries(rows, covered)


def write_index(path: Path, entries: Entries) -> None:
    """Writes the index of a shard atomically. It may fail, because it can be made again."""
    payload = entries.covered.to_bytes(8, "little") + entries.rows.tobytes()
    with suppress(OSError):
        write_file(path.with_suffix(INDEX), _header(_INDEX_KEY, payload) + payload)


def _read_index(path: Path, shard_bytes: int) -> Entries | None:
    """Returns the index of a shard without entries beyond its end; None if there is none or it is damaged."""
    try:
        data = path.with_suffix(INDEX).read_bytes()
    except OSError:
        return None
    header, payload = data[:HEADER_BYTES], data[HEADER_BYTES:]
    if header != _header(_INDEX_KEY, payload) or (len(payload) - 8) % _ROW.itemsize:
        return None
    rows = np.frombuffer(payload[8:], _ROW)
    ends = rows["offset"] + HEADER_BYTES + rows["length"]
    return Entries(rows[ends <= shard_bytes], int.from_bytes(payload[:8], "little"))


def _as_rows(places: Sequence[tuple[bytes, int, int]]) -> NDArray[np.void]:
    """Returns the rows of keys, offsets and lengths."""
    rows = np.empty(len(places), _ROW)
    if places:
        keys, offsets, lengths = zip(*places, strict=True)
        rows["key"] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
        rows["offset"], rows["length"] = offsets, lengths
    return rows


def _scan(file: int, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields key, offset and length of each intact entry between two bytes of a shard."""
    offset = start
    while offset + HEADER_BYTES <= end:
        header = _at(file, offset, HEADER_BYTES)
        parsed = _parsed(header)
        if parsed is None:
            offset = _next_magic(file, offset + 1, end)
            continue
        key, length = parsed
        payload = _at(file, offset + HEADER_BYTES, length) if offset + HEADER_BYTES + length <= end else b""
        if len(payload) == length and header == _header(key, payload):
            yield key, offset, length
            offset += HEADER_BYTES + length
        else:
            offset = _next_magic(file, offset + 1, end)


def _next_magic(file: int, start: int, end: int) -> int:
    """Returns the offset at which the next header may begin, or `end`."""
    while start < end:
        found = _at(file, start, min(_WINDOW, end - start)).find(_MAGIC)
        if found >= 0:
            return start + found
        start += _WINDOW - len(_MAGIC) + 1
    return end


def _header(key: bytes, payload: bytes) -> bytes:
    assert len(key) == KEY_BYTES
    body = _HEADER.pack(_MAGIC, key, len(payload), zlib.crc32(payload), 0)[:_BODY]
    return body + zlib.crc32(body).to_bytes(4, "little")


def _parsed(header: bytes) -> tuple[bytes, int] | None:
    """Returns the key and the length of an entry; None if this is no intact header."""
    magic, key, length, _, check = _HEADER.unpack(header)
    return (key, length) if magic == _MAGIC and check == zlib.crc32(header[:_BODY]) else None


def _at(file: int, offset: int, length: int) -> bytes:
    """Reads up to `length` bytes; fewer only at the end of the file."""
    data = os.pread(file, length, offset)
    if len(data) == length:
        return data
    parts = [data]
    while data and (missing := length - sum(map(len, parts))):
        data = os.pread(file, missing, offset + length - missing)
        parts.append(data)
    return b"".join(parts)


def _disk_error(folder: Path, error: OSError) -> DiskError:
    return DiskError(
        f"data.cache_dir: cannot write cache entries into {folder}: {error.strerror}; free space, or set data.cache_dir"
        " to a folder on a larger disk"
    )
