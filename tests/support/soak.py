"""The long form of tests: `scripts/soak` sets how often they try, and collects what they report."""

import os
from pathlib import Path


def tries(name: str, short: int) -> int:
    """Returns how often a test tries: `short`, or what the variable HALFBYTE_SOAK_name says."""
    return int(os.environ.get(f"HALFBYTE_SOAK_{name}", short))


def report(name: str, **counts: int) -> None:
    """Adds a row to the report of `scripts/soak`, if it runs the test."""
    file = os.environ.get("HALFBYTE_SOAK_REPORT")
    if file is not None:
        listed = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items())
        with Path(file).open("a", encoding="utf-8") as stream:
            stream.write(f"| {name} | {listed} |\n")
