"""Reads captions from metadata.jsonl, metadata.csv and .txt files, and reports every mistake in them."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CAPTION_COLUMNS = ("text", "caption")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")

_MAX_LINES = 50


@dataclass
class Problems:
    """Collects all problems, one line each, so that the user can fix them in one go."""

    lines: list[str] = field(default_factory=list)

    def add(self, where: object, what: str) -> None:
        """Adds the line `where: what`."""
        self.lines.append(f"{where}: {what}")

    def __str__(self) -> str:
        hidden = len(self.lines) - _MAX_LINES
        return "\n".join(
            self.lines[:_MAX_LINES] + ([f"... and {hidden} more like these"] if hidden > 0 else [])
        )


@dataclass(frozen=True)
class CaptionRow:
    """One row of a metadata file."""

    where: str  # file:line
    file_name: str  # relative to the metadata file's folder
    text: str  # the caption


def read_metadata(path: Path, problems: Problems) -> list[CaptionRow]:
    """Reads the rows of a metadata.jsonl or metadata.csv. Adds unusable rows to `problems` and leaves them out."""
    text = read_text(path, problems)
    if text is None:
        return []
    rows = _jsonl_rows(path, text, problems) if path.suffix == ".jsonl" else _csv_rows(path, text, problems)
    found: list[CaptionRow] = []
    for where, row in rows:
        name = row.get("file_name")
        if not isinstance(name, str) or not name.strip():
            problems.add(where, f"file_name: got {name!r}, expected an image's path relative to this file")
            continue
        caption = caption_of(where, row, problems)
        if caption is not None:
            found.append(CaptionRow(where, name.strip(), caption))
    return found


def caption_of(where: object, row: dict[str, object], problems: Problems) -> str | None:
    """Returns the caption in a row's columns: "" if the column is empty or null, None after adding a problem."""
    given = {column: row[column] for column in CAPTION_COLUMNS if column in row}
    if not given:
        columns = ", ".join(repr(column) for column in row) or "none"
        problems.add(where, f"no caption column; expected 'text' or 'caption', found {columns}")
        return None
    if len(set(map(str, given.values()))) > 1:
        problems.add(where, "the columns 'text' and 'caption' have different values; keep one column")
        return None
    value = next(iter(given.values()))
    if value is None:
        return ""
    if not isinstance(value, str):
        problems.add(where, f"the caption is {value!r}, expected a string")
        return None
    if not value.isascii() and value.encode(errors="replace").decode() != value:
        problems.add(
            where, f"the caption {value!r} contains half of a character (a lone surrogate); retype it"
        )
        return None
    return value.strip()


def read_text(path: Path, problems: Problems) -> str | None:
    """Reads a UTF-8 file without its byte-order mark. Returns None after adding a problem."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        problems.add(f"{path}:{line}", f"not UTF-8 (byte {error.object[error.start]:#04x}); save it as UTF-8")
    except OSError as error:
        problems.add(path, f"cannot be read: {error.strerror}")
    return None


def _jsonl_rows(path: Path, text: str, problems: Problems) -> Iterator[tuple[str, dict[str, object]]]:
    # split, not splitlines: a caption may contain U+2028 and similar, which do not end a line in JSON Lines.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.add(where, f"not valid JSON: {error.msg} at column {error.colno}")
            continue
        except (ValueError, RecursionError) as error:  # thousands of digits or nested brackets
            problems.add(where, f"not usable JSON: {error}")
            continue
        if not isinstance(row, dict):
            problems.add(
                where, f'got {line[:40]}, expected an object such as {{"file_name": ..., "text": ...}}'
            )
            continue
        yield where, row


def _csv_rows(path: Path, text: str, problems: Problems) -> Iterator[tuple[str, dict[str, object]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        columns = reader.fieldnames or []
        if "file_name" not in columns or not set(CAPTION_COLUMNS) & set(columns):
            found = ", ".join(map(repr, columns)) or "nothing"
            problems.add(f"{path}:1", f"found the columns {found}, expected file_name and text (or caption)")
            return
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row:
                problems.add(where, "more fields than the header; put captions that contain commas in quotes")
            elif None in row.values():
                problems.add(where, "fewer fields than the header")
            else:
                yield where, dict(row)
    except csv.Error as error:
        problems.add(f"{path}:{reader.line_num}", f"not valid CSV: {error}")
