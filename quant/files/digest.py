"""A digest of a large file's content, made of its chunks', so that many threads can make it at once."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK_BYTES = 16 * 2**20
READING_THREADS = min(8, os.cpu_count() or 1)
"""Enough to read a page cache at memory's pace; a disk is busy with fewer."""


def sha256_of(content: str | bytes) -> str:
    """The SHA-256 of a text (as UTF-8) or bytes, in hexadecimal."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file, as the Hub and `sha256sum` give it; for large files on every start see `file_digest`."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def chunk_digest(data: bytes | memoryview) -> bytes:
    """Of one chunk: CHUNK_BYTES from a multiple of CHUNK_BYTES on, or what is left of the file there."""
    return hashlib.sha256(data).digest()


def combined(chunks: Sequence[bytes]) -> str:
    """The digest of a file from those of all its chunks, in order."""
    return hashlib.sha256(b"".join(chunks)).hexdigest()


def file_digest(path: Path) -> str:
    """The digest of a file as it is now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:

        def digest_at(start: int) -> bytes:
            return chunk_digest(os.pread(descriptor, CHUNK_BYTES, start))

        starts = range(0, os.fstat(descriptor).st_size, CHUNK_BYTES)
        with ThreadPoolExecutor(READING_THREADS) as pool:
            return combined(list(pool.map(digest_at, starts)))
    finally:
        os.close(descriptor)
