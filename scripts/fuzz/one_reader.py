"""Fuzzes one reader: python -m scripts.fuzz.one_reader NAME SECONDS FOLDER.

FOLDER gets the inputs that reach new code.
"""

import hashlib
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["halfbyte"]):
    from scripts.fuzz.readers import LONGEST, READERS, inputs


def _fuzz(name: str, seconds: int, corpus: Path) -> None:
    """Fuzzes one reader; ends the process."""
    logging.disable()
    corpus.mkdir(parents=True, exist_ok=True)
    for content in inputs(name):
        (corpus / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)
    work = Path(tempfile.mkdtemp())

    def once(content: bytes) -> None:
        folder = work / "input"
        folder.mkdir()
        began = time.monotonic()
        READERS[name].check(content, folder)
        shutil.rmtree(folder)
        assert time.monotonic() - began < 10, "took more than 10 seconds"

    options = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-rss_limit_mb=2048", "-timeout=10"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={corpus.parent}/{name}-", str(corpus)], once)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    _fuzz(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
