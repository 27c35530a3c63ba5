"""Remembers the digests of large files by path, size and modification time, so each file is hashed only once."""

import logging
import os
import re
from pathlib import Path

from halfbyte.quant.files.atomic import write_file
from halfbyte.quant.files.digest import file_digest, sha256_of

log = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{64}")


class FileDigests:
    """A folder that remembers digests. Several processes may share one folder."""

    def __init__(self, memo: Path) -> None:
        self._memo = memo

    def of(self, file: Path) -> str:
        """Returns the digest of a file's content.

        Reads the file if its digest is not remembered. Raises OSError.
        """
        status = file.stat()
        known = self._remembered(file, status)
        if known is not None:
            return known
        digest = file_digest(file)
        self.remember(file, status, digest)
        return digest

    def known(self, file: Path) -> str | None:
        """Returns the remembered digest of the file in its current state, or None."""
        return self._remembered(file, file.stat())

    def remember(self, file: Path, status: os.stat_result, digest: str) -> None:
        """Stores the digest of a file, unless the file changed since reading began, when its stat was `status`."""
        if _identity(file, file.stat()) != _identity(file, status):
            return
        kept = self._kept(file, status)
        try:
            self._memo.mkdir(parents=True, exist_ok=True)
            write_file(kept, digest)
        except OSError as error:
            log.warning("cannot store the digest of %s, so the next run reads it again: %s", file, error)

    def _remembered(self, file: Path, status: os.stat_result) -> str | None:
        try:
            digest = self._kept(file, status).read_text()
        except OSError:
            return None
        # A crash can leave a truncated digest.
        return digest if _DIGEST.fullmatch(digest) else None

    def _kept(self, file: Path, status: os.stat_result) -> Path:
        return self._memo / sha256_of(_identity(file, status))


def _identity(file: Path, status: os.stat_result) -> str:
    return f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}"
