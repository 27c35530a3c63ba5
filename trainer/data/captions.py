"""Captions beside pictures: metadata.jsonl, metadata.csv and .txt files, read strictly."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CAPTION_COLUMNS = ("text", "caption")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")

_SHOWN = 50


@dataclass
class Problems:
    """Everything found wrong, one line each, so that the user mends it all at once."""

    lines: list[str] = field(default_factory=list)

    def add(self, where: object, what: str) -> None:
        self.lines.append(f"{where}: {what}")

    def __str__(self) -> str:
        hidden = len(self.lines) - _SHOWN
        return "\n".join(self.lines[:_SHOWN] + ([f"... and {hidden} more like these"] if hidden > 0 else []))


@dataclass(frozen=True)
class CaptionRow:
    """One row of a metadata file."""

    where: str  # file:line
    file_name: str  # relative to the metadata file's folder
    text: str


def read_metadata(path: Path, problems: Problems) -> list[CaptionRow]:
    """The rows of one metadata.jsonl or metadata.csv; unusable rows become problems."""
    text = read_text(path, problems)
    if text is None:
        return []
    rows = _jsonl_rows(path, text, problems) if path.suffix == ".jsonl" else _csv_rows(path, text, problems)
    found: list[CaptionRow] = []
    for where, row in rows:
        name = row.get("file_name")
        if not isinstance(name, str) or not name.strip():
            problems.add(where, f"file_name: got {name!r}, expected the picture's path beside this file")
            continue
        caption = caption_of(where, row, problems)
        if caption is not None:
            found.append(CaptionRow(where, name.strip(), caption))
    return found


def caption_of(where: object, row: dict[str, object], problems: Problems) -> str | None:
    """The caption among a row's columns; None after a problem, "" where the column is empty or null."""
    given = {column: row[column] for column in CAPTION_COLUMNS if column in row}
    if not given:
        columns = ", ".join(repr(column) for column in row) or "none"
        problems.add(where, f"no caption column; expected 'text' or 'caption', found {columns}")
        return None
    if len(set(map(str, given.values()))) > 1:
        problems.add(where, "'text' and 'caption' differ; keep one of them")
        return None
    value = next(iter(given.values()))
    if value is None:
        return ""
    if not isinstance(value, str):
        problems.add(where, f"the caption is {value!r}; expected a string")
        return None
    if not value.isascii() and value.encode(errors="replace").decode() != value:
        problems.add(
            where, f"the caption {value!r} holds half of a character (a lone surrogate); write it anew"
        )
        return None
    return value.strip()


def read_text(path: Path, problems: Problems) -> str | None:
    """A UTF-8 file's text without a byte-order mark; None after a problem."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        problems.add(f"{path}:{line}", f"not UTF-8 (byte {error.object[error.start]:#04x}); save it as UTF-8")
    except OSError as error:
        problems.add(path, f"cannot be read: {error.strerror}")
    return None


def _jsonl_rows(path: Path, text: str, problems: Problems) -> Iterator[tuple[str, dict[str, object]]]:
    # split, not splitlines: a caption may hold U+2028 and the like, which are no line ends in JSON lines.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.add(where, f"not valid JSON: {error.msg} at column {error.colno}")
            continue
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets without end
            problems.add(where, f"not usable JSON: {error}")
            continue
        if not isinstance(row, dict):
            problems.add(
                where, f'expected an object such as {{"file_name": ..., "text": ...}}, got {line[:40]}'
            )
            continue
        yield where, row


def _csv_rows(path: Path, text: str, problems: Problems) -> Iterator[tuple[str, dict[str, object]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        columns = reader.fieldnames or []
        if "file_name" not in columns or not set(CAPTION_COLUMNS) & set(columns):
            found = ", ".join(map(repr, columns)) or "nothing"
            problems.add(f"{path}:1", f"expected the columns file_name and text (or caption), found {found}")
            return
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row:
                problems.add(where, "more fields than the header; quote captions that hold commas")
            elif None in row.values():
                problems.add(where, "fewer fields than the header")
            else:
                yield where, dict(row)
    except csv.Error as error:
        problems.add(f"{path}:{reader.line_num}", f"not valid CSV: {error}")
