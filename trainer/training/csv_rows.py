"""Reads a CSV file of a run that may be damaged: by a flipped bit, a crash, an editor or a spreadsheet."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from halfbyte.quant.files.atomic import write_file

log = logging.getLogger(__name__)

_LINE_END = re.compile(
    "\r\n|\r|\n"
)  # str.splitlines would also split at characters that only damage puts there
_BOM = "\ufeff"


class HasStep(Protocol):
    """A row that belongs to an optimizer step."""

    @property
    def step(self) -> int:
        """The number of the step."""


Row = TypeVar("Row", bound=HasStep)


@dataclass(frozen=True)
class Rows(Generic[Row]):
    """The readable rows of a file, in the order of their steps."""

    rows: list[Row]
    fault: str | None  # the first line that is damaged, and how; None for a file as a run writes it


def read_rows(
    path: Path,
    header: Callable[[Sequence[str]], tuple[Sequence[str], bool]],
    convert: Callable[[dict[str, str]], Row],
) -> Rows[Row]:
    """Reads the rows that are readable.

    header: returns the columns' names from the first line's cells, and True if a run writes this header.
    convert: makes a row from its cells, by column. Both raise ValueError for what they cannot read. A last
    row that a crash cut short is skipped and is no fault.
    """
    if not path.is_file():
        return Rows([], None)
    text, fault = _decoded(path.read_bytes())
    first, *lines = _LINE_END.split(text)
    delimiter = max(",;\t", key=first.count)
    if delimiter != ",":
        fault = f"line 1: columns are separated by {delimiter!r}, not by commas"
    cells = _cells(first, delimiter)
    try:
        names, usual = header(cells)
    except ValueError as error:
        return Rows([], f"line 1: {error}")
    if not usual:
        fault = fault or f"line 1: the header is {first[:200]!r}"
    found: list[tuple[int, Row]] = []
    for number, line in enumerate(lines, start=2):
        values = [value.replace(",", ".") for value in _cells(line, delimiter)]
        try:
            if len(values) != len(names):
                raise ValueError(f"{len(values)} values for {len(names)} columns")
            found.append((number, convert(dict(zip(names, values, strict=True)))))
        except ValueError as error:
            if number <= len(lines):  # the last line is empty, or was cut short
                fault = fault or f"line {number}: {error}"
    rows, disorder = _in_order(found)
    return Rows(rows, fault or disorder)


def keep_damaged(path: Path, fault: str, readable: int) -> None:
    """Keeps a copy of a damaged file, which is about to be written again, and says so in a warning."""
    content = path.read_bytes()
    for number in count(1):
        copy = path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")
        if not copy.exists():
            write_file(copy, content)
            break
        # A run that was killed here before has made the copy already.
        if copy.read_bytes() == content:
            break
    log.warning(
        "%s: damaged or changed, %s. The run goes on with the %d rows that can be read; the file as it was is %s",
        path,
        fault,
        readable,
        copy.name,
    )


def is_near(text: str, expected: str) -> bool:
    """Returns True if at most one character differs, as after a flipped bit."""
    return len(text) == len(expected) and sum(a != b for a, b in zip(text, expected, strict=True)) <= 1


def whole_number(text: str) -> int:
    """Reads a step. Raises ValueError."""
    number = float(text)
    if not number.is_integer() or number < 0:
        raise ValueError(f"the step is {text!r}")
    return int(number)


def _decoded(content: bytes) -> tuple[str, str | None]:
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    text = content.decode(encoding, errors="replace")
    if encoding == "utf-16" or text.startswith(_BOM):
        return text.removeprefix(_BOM), "line 1: the file begins with a byte order mark"
    return text, None


def _cells(line: str, delimiter: str) -> list[str]:
    # Not csv.reader: for it, one damaged quote makes the rest of the file a single value.
    return [cell.strip().strip('"') for cell in line.split(delimiter)]


def _in_order(found: Sequence[tuple[int, Row]]) -> tuple[list[Row], str | None]:
    """Returns the rows whose steps increase, and the first line that breaks the order."""
    rows: list[Row] = []
    fault = None
    for place, (number, row) in enumerate(found):
        after_last = not rows or rows[-1].step < row.step
        if after_last and all(row.step < following.step for _, following in found[place + 1 : place + 2]):
            rows.append(row)
        else:
            fault = fault or f"line {number}: step {row.step} is out of order"
    return rows, fault
