"""Reads captions from the rows of tables and from text and JSON files, and reports every mistake in them."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.quant.files.regular import Opener, open_regular
from halfbyte.trainer.data.archives.columns import CAPTION_COLUMNS
from halfbyte.trainer.data.records.problems import Problems
from halfbyte.trainer.wording import shown

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")

CAPTION_BYTES = 10**6
"""Longer captions are refused; the text encoders read at most a few thousand bytes."""
_METADATA_BYTES = 2 * 10**9
_LINE_CHARACTERS = 8 * CAPTION_BYTES  # of JSON, which may escape each character

# Stands for captions with a reported problem, so that they are not reported as missing too.
UNREADABLE = ("?",)

MOST_CAPTIONS = 1000
"""The most captions of one image."""


@dataclass(frozen=True)
class CaptionRow:
    """One row of a metadata file."""

    where: str  # file:line
    file_name: str  # relative to the metadata file's folder
    texts: tuple[str, ...]  # the captions; empty if the row has none


def read_metadata(path: Path, problems: Problems, opener: Opener = open_regular) -> list[CaptionRow]:
    """Reads the rows of a metadata.jsonl or metadata.csv. Adds unusable rows to `problems` and leaves them out."""
    found: list[CaptionRow] = []
    for where, row in metadata_rows(path, problems, opener):
        name = row.get("file_name")
        if not isinstance(name, str) or not name.strip():
            problems.add(
                where, f"file_name: got {shown(name)}, expected an image's path relative to this file"
            )
            continue
        texts = captions_of(where, row, problems)
        if texts is not None:
            found.append(CaptionRow(where, name.strip(), texts))
    return found


def captions_of(
    where: object,
    row: Mapping[str, object],
    problems: Problems,
    names: Sequence[str] = CAPTION_COLUMNS,
) -> tuple[str, ...] | None:
    """Returns the captions in a row's columns, one or a list; none if the column is empty or null.

    Returns None after adding a problem.
    """
    given = {column: row[column] for column in names if column in row}
    if not given:
        columns = ", ".join(shown(column) for column in list(row)[:20]) or "none"
        problems.add(where, f"no caption column; expected 'text' or 'caption', found {columns}")
        return None
    if len(set(map(str, given.values()))) > 1:
        problems.add(where, "the columns 'text' and 'caption' have different values; keep one column")
        return None
    value = next(iter(given.values()))
    if value is None:
        return ()
    if not isinstance(value, list):
        text = _usable(where, "the caption", value, problems)
        return None if text is None else (text,) if text else ()
    if len(value) > MOST_CAPTIONS:
        problems.add(
            where,
            f"has {len(value):,} captions, expected at most {MOST_CAPTIONS:,} for an image; remove some",
        )
        return None
    texts = [
        _usable(where, f"caption {number} of {len(value)}", item, problems)
        for number, item in enumerate(value, start=1)
    ]
    if "" in texts:
        problems.add(where, f"caption {texts.index('') + 1} of {len(value)} is empty; remove it")
    found = tuple(text for text in texts if text)
    return found if len(found) == len(value) else None


def _usable(where: object, what: str, value: object, problems: Problems) -> str | None:
    """Returns a caption without the spaces around it, or None after adding a problem."""
    if not isinstance(value, str):
        problems.add(where, f"{what} is {shown(value)}, expected a string")
        return None
    data = value.encode(errors="replace")
    if len(data) > CAPTION_BYTES:
        problems.add(where, f"{what} has {len(data):,} bytes, expected at most {CAPTION_BYTES:,}; shorten it")
        return None
    if not value.isascii() and data.decode() != value:
        problems.add(
            where, f"{what} {shown(value)} contains half of a character (a lone surrogate); retype it"
        )
        return None
    return value.strip()


def read_text(path: Path, problems: Problems, opener: Opener = open_regular) -> str | None:
    """Reads a caption file in UTF-8, without its byte-order mark. Returns None after adding a problem."""
    try:
        with opener(path, CAPTION_BYTES) as file:
            text = file.read(CAPTION_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        problems.add(f"{path}:{line}", _not_utf8(error))
    except OSError as error:
        problems.add(path, f"cannot be read: {error.strerror}")
    else:
        if "\0" not in text:
            return text
        problems.add(path, "contains NUL characters, as UTF-16 does; save it as UTF-8")
    return None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte {error.object[error.start]:#04x}); save it as UTF-8"


def metadata_rows(
    path: Path, problems: Problems, opener: Opener = open_regular
) -> Iterator[tuple[str, dict[str, object]]]:
    """Yields the rows of a metadata file with their places, without reading the whole file into memory."""
    try:
        if path.suffix == ".jsonl":
            # Only \n ends a line: a caption may contain U+2028 and similar.
            yield from _jsonl_rows(path, _lines(path, "\n", problems, opener), problems)
        else:
            yield from _csv_rows(path, _lines(path, "", problems, opener), problems)
    except UnicodeDecodeError as error:
        problems.add(f"{path}:{_undecodable_line(path, opener)}", _not_utf8(error))
    except OSError as error:
        problems.add(path, f"cannot be read: {error.strerror}")


def _lines(path: Path, newline: str, problems: Problems, opener: Opener) -> Iterator[str]:
    """Yields a metadata file's lines; `newline` as for `open`. Stops with a problem at a line that is too long."""
    with io.TextIOWrapper(opener(path, _METADATA_BYTES), encoding="utf-8-sig", newline=newline) as file:
        number = 0
        while line := file.readline(_LINE_CHARACTERS + 1):
            number += 1
            if len(line) > _LINE_CHARACTERS:
                problems.add(
                    f"{path}:{number}", f"the line has more than {_LINE_CHARACTERS:,} characters; shorten it"
                )
                return
            yield line


def _undecodable_line(path: Path, opener: Opener) -> int:
    """Returns the number of the first line that is not UTF-8."""
    with opener(path, _METADATA_BYTES) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _jsonl_rows(
    path: Path, lines: Iterator[str], problems: Problems
) -> Iterator[tuple[str, dict[str, object]]]:
    for number, line in enumerate(lines, start=1):
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
                where,
                f'got {line[:40].rstrip()}, expected an object such as {{"file_name": ..., "text": ...}}',
            )
            continue
        yield where, row


def _csv_rows(
    path: Path, lines: Iterator[str], problems: Problems
) -> Iterator[tuple[str, dict[str, object]]]:
    reader = csv.DictReader(lines)
    try:
        columns = reader.fieldnames or []
        if "file_name" not in columns or not set(CAPTION_COLUMNS) & set(columns):
            found = ", ".join(map(shown, columns[:20])) or "nothing"
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


@dataclass(frozen=True)
class OwnCaptions:
    """The captions that a source has for one image."""

    where: str  # the file, with the line of a table
    texts: tuple[str, ...]  # empty: the source has an empty caption
    source: str  # the file's name, for messages


def agreed(picture: Path, found: Sequence[OwnCaptions], problems: Problems) -> OwnCaptions:
    """Returns the captions of one image from several files; adds a problem if they differ."""
    first, *others = found
    for other in others:
        if other.texts != first.texts and UNREADABLE not in (other.texts, first.texts):
            problems.add(
                picture, f"has different captions in {first.source} and in {other.source}; keep one of them"
            )
            break
    return first
