"""Looks for inputs that make a reader fail in another way than with its message.

    pip install halfbyte[fuzz]
    python -m scripts.fuzz --seconds 600
    python -m scripts.fuzz --seconds 60 --reader recipe --keep

Atheris changes valid inputs and keeps those that reach new code. `--keep` adds what it kept to `scripts/fuzz/corpus`,
which the tests read again. An input that fails is printed with its traceback and stored in the folder that is printed.
"""

import argparse
import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from scripts.fuzz.readers import CORPUS, READERS


def _keep(name: str, found: Path) -> None:
    """Adds to the kept corpus, of the found inputs, the shortest ones that reach lines that no other one reaches."""
    reached: set[object] = set()
    (CORPUS / name).mkdir(parents=True, exist_ok=True)
    kept = sorted((CORPUS / name).iterdir())
    for content in READERS[name].seeds:
        reached |= _lines(name, content)
    for file in [*kept, *_shortest_first(found)]:
        content = file.read_bytes()
        lines = _lines(name, content)
        if file.parent == found and not lines <= reached:
            (CORPUS / name / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)
        reached |= lines


def _shortest_first(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda file: (file.stat().st_size, file.name))


def _lines(name: str, content: bytes) -> set[object]:
    """Returns the lines of halfbyte that a reader runs for an input, with the line that each came from."""
    lines: set[object] = set()
    last = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal last
        if not frame.f_globals.get("__name__", "").startswith("halfbyte."):
            return None
        lines.add((frame.f_code.co_filename, last, frame.f_lineno))
        last = frame.f_lineno
        return trace

    with tempfile.TemporaryDirectory() as folder:
        sys.settrace(trace)
        try:
            READERS[name].check(content, Path(folder))
        finally:
            sys.settrace(None)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=600, help="for each reader")
    parser.add_argument("--reader", help="only this one")
    parser.add_argument("--keep", action="store_true", help="add what reached new code to the corpus")
    given = parser.parse_args()
    names = [given.reader] if given.reader else list(READERS)
    work = Path(tempfile.mkdtemp(prefix="fuzz-"))
    failed = []
    for name in names:
        # Atheris ends its process.
        command = [
            sys.executable,
            "-m",
            "scripts.fuzz.one_reader",
            name,
            str(given.seconds),
            str(work / name),
        ]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        elif given.keep:
            logging.disable()
            _keep(name, work / name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the inputs are in {work}")
    shutil.rmtree(work)
    print(f"{len(names)} readers, {given.seconds} seconds each, no failure")


if __name__ == "__main__":
    main()
