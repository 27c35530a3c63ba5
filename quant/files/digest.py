"""Computes digests of files; a large file's digest combines those of its chunks, for several threads."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK_BYTES = 16 * 2**20
READING_THREADS = min(8, os.cpu_count() or 1)
"""Enough threads to read the page cache at memory speed; fewer already keep a disk busy."""


def sha256_of(content: str | bytes) -> str:
    """Returns the SHA-256 of a text (as UTF-8) or bytes, in hexadecimal."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal, as the Hub and `sha256sum` do.

    It reads the file in one thread; `file_digest` is faster for large files.
    """
    digest = hashlib.sha256()
    # In large chunks, not those of hashlib.file_digest: at each one this thread may wait for Python's lock, for
    # 5 ms if another thread trains.
    with path.open("rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def chunk_digest(data: bytes | memoryview) -> bytes:
    """Returns the SHA-256 of a chunk: CHUNK_BYTES from a multiple of CHUNK_BYTES, or fewer at the end."""
    return hashlib.sha256(data).digest()


def combined(chunks: Sequence[bytes]) -> str:
    """Returns a file's digest from the digests of all its chunks, in order."""
    return hashlib.sha256(b"".join(chunks)).hexdigest()


def file_digest(path: Path) -> str:
    """Computes the digest of a file's current content with several threads; it is not the file's SHA-256."""
    descriptor = os.open(path, os.O_RDONLY)
    try:

        def digest_at(start: int) -> bytes:
            return chunk_digest(os.pread(descriptor, CHUNK_BYTES, start))

        starts = range(0, os.fstat(descriptor).st_size, CHUNK_BYTES)
        with ThreadPoolExecutor(READING_THREADS) as pool:
            return combined(list(pool.map(digest_at, starts)))
    finally:
        os.close(descriptor)
