"""The long form of tests: `scripts/soak` sets how often they try, and collects what they report.

As a program, it prints the collected reports as rows of a table.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

_Item = TypeVar("_Item")


def tries(name: str, short: int) -> int:
    """Returns how often a test tries: `short`, or what the variable HALFBYTE_SOAK_name says."""
    return int(os.environ.get(f"HALFBYTE_SOAK_{name}", short))


def parts() -> range:
    """Returns the numbers of the parts that a long test is split into, so that several processes share it."""
    return range(tries("PARTS", 1))


def share(items: Sequence[_Item], part: int) -> Sequence[_Item]:
    """Returns the items that one of the parts tries."""
    return items[part :: len(parts())]


def is_reported() -> bool:
    """Returns True if `scripts/soak` runs the test."""
    return "HALFBYTE_SOAK_REPORT" in os.environ


def report(name: str, **counts: int) -> None:
    """Adds counts to a row of the report of `scripts/soak`, if it runs the test. Counts of all parts are added up."""
    if is_reported():
        with Path(os.environ["HALFBYTE_SOAK_REPORT"]).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([name, counts]) + "\n")


def rows(lines: Iterable[str]) -> list[str]:
    """Returns the rows of the report's table, sorted by name."""
    total: dict[str, Counter[str]] = {}
    for line in lines:
        name, counts = json.loads(line)
        row = total.setdefault(name, Counter())
        for what, count in counts.items():
            row[what] += count
    return [f"| {name} | {_listed(total[name])} |" for name in sorted(total)]


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items())


if __name__ == "__main__":
    print("\n".join(rows(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines())))
