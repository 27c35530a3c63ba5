"""Digests of large files, remembered by path, size and time of change, so that a file is read for one once."""

import logging
import os
import re
from pathlib import Path

from halfbyte.quant.files.atomic import write_file
from halfbyte.quant.files.digest import file_digest, sha256_of

log = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{64}")


class FileDigests:
    """The digests that a folder remembers; several processes may use one folder."""

    def __init__(self, memo: Path) -> None:
        self._memo = memo

    def of(self, file: Path) -> str:
        """The digest of a file's content, read if it is not remembered. Raises OSError."""
        status = file.stat()
        known = self._remembered(file, status)
        if known is not None:
            return known
        digest = file_digest(file)
        self.remember(file, status, digest)
        return digest

    def known(self, file: Path) -> str | None:
        """The digest if it is remembered for the file as it is now."""
        return self._remembered(file, file.stat())

    def remember(self, file: Path, status: os.stat_result, digest: str) -> None:
        """Keeps the digest of a file that was as `status` says when reading it began, unless it has changed."""
        if _identity(file, file.stat()) != _identity(file, status):
            return
        kept = self._kept(file, status)
        try:
            self._memo.mkdir(parents=True, exist_ok=True)
            write_file(kept, digest)
        except OSError as error:
            log.warning("the digest of %s is not kept, and the next start reads it again: %s", file, error)

    def _remembered(self, file: Path, status: os.stat_result) -> str | None:
        try:
            digest = self._kept(file, status).read_text()
        except OSError:
            return None
        # A memo cut short by a crash is none.
        return digest if _DIGEST.fullmatch(digest) else None

    def _kept(self, file: Path, status: os.stat_result) -> Path:
        return self._memo / sha256_of(_identity(file, status))


def _identity(file: Path, status: os.stat_result) -> str:
    return f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}"
