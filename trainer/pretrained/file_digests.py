"""Remembers the digests of large files by path, size and modification time, so each file is hashed only once."""

import logging
import os
import re
from pathlib import Path

from halfbyte.quant.files.atomic import write_file
from halfbyte.quant.files.digest import file_digest, sha256_of

log = logging.getLogger(__name__)

# A digest, and since version 0.3 a checksum of it.
_KEPT = re.compile(r"([0-9a-f]{64})(?: ([0-9a-f]{16})\n)?")


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
            write_file(kept, f"{digest} {_check(kept, digest)}\n")
        except OSError as error:
            log.warning("cannot store the digest of %s, so the next run reads it again: %s", file, error)

    def _remembered(self, file: Path, status: os.stat_result) -> str | None:
        kept = self._kept(file, status)
        try:
            text = kept.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            return None
        # Damage may leave anything. A digest that is believed wrongly would say that the file has changed.
        found = _KEPT.fullmatch(text)
        if found is None or found[2] not in (None, _check(kept, found[1])):
            return None
        return found[1]

    def _kept(self, file: Path, status: os.stat_result) -> Path:
        return self._memo / sha256_of(_identity(file, status))


def _identity(file: Path, status: os.stat_result) -> str:
    return f"{file.resolve()}:{status.st_size}:{status.st_mtime_ns}"


def _check(kept: Path, digest: str) -> str:
    return sha256_of(f"{kept.name} {digest}")[:16]
