"""Reads data sets saved by `datasets.save_to_disk`: Arrow files, mapped into memory."""

import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]

from halfbyte.quant.files.regular import read_regular, require_regular
from halfbyte.trainer.data.archives.columns import TABLE_BYTES, Columns, embedded_bytes, is_table_file
from halfbyte.trainer.data.records.problems import Problems
from halfbyte.trainer.wording import in_prose, shown

SUFFIX = ".arrow"
STATE = "state.json"  # of a Dataset
SPLITS = "dataset_dict.json"  # of a DatasetDict

_STATE_BYTES = 10**8
_BATCH_ROWS = 64


def is_saved(folder: Path) -> bool:
    """Returns True if a folder holds a saved data set."""
    return (folder / STATE).is_file() or (folder / SPLITS).is_file()


def saved_files(folder: Path, split: str | None, problems: Problems) -> list[Path]:
    """Returns the Arrow files of a saved data set, in order; none after adding a problem.

    split: of a data set with several; None: the only one, or train.
    """
    if (folder / SPLITS).is_file():
        splits = _texts(folder / SPLITS, "splits", problems)
        chosen = chosen_split(folder, splits, split, problems)
        if chosen is None:
            return []
        folder = folder / chosen
    elif split is not None:
        problems.add(folder, f"has no splits, but split is {shown(split)}; remove that setting")
        return []
    file = folder / STATE
    names = _texts(file, "_data_files", problems, "filename")
    if names is not None and not names:
        problems.add(file, "lists no Arrow files")
    state = _read(file, Problems())
    if isinstance(state, dict) and state.get("_indices_data_files"):
        problems.add(
            file, "selects rows with an index; load the data set, call flatten_indices() and save it again"
        )
        return []
    return [folder / name for name in names or ()]


def chosen_split(
    where: Path, splits: Sequence[str] | None, split: str | None, problems: Problems
) -> str | None:
    """Returns the split to read, or None after adding a problem."""
    if splits is None:
        return None
    wanted = split if split is not None else "train" if "train" in splits else None
    if wanted is None and len(splits) == 1:
        wanted = splits[0]
    if wanted in splits:
        return wanted
    listed = in_prose(splits) if splits else "none"
    got = "no split" if split is None else f"the split {shown(split)}"
    problems.add(where, f"got {got}, expected {listed}; set data.split")
    return None


def _read(file: Path, problems: Problems) -> Any:
    try:
        return json.loads(read_regular(file, _STATE_BYTES))
    except OSError as error:
        problems.add(file, f"cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        problems.add(file, f"not usable JSON: {error}")
    return None


def _texts(file: Path, key: str, problems: Problems, inner: str | None = None) -> list[str] | None:
    """Returns a list of names in a JSON file, each of one file or folder next to it."""
    value = _read(file, problems)
    if value is None:
        return None
    names = value.get(key) if isinstance(value, dict) else None
    if isinstance(names, list) and inner is not None:
        names = [one.get(inner) if isinstance(one, dict) else None for one in names]
    if not isinstance(names, list) or not all(_is_plain(name) for name in names):
        problems.add(file, f"{key}: got {shown(names)}, expected names of files in this folder")
        return None
    return names


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


@dataclass(frozen=True)
class _Mapped:
    """An Arrow file in memory that the system reads when it is needed."""

    batches: Sequence[pyarrow.RecordBatch]
    starts: Sequence[int]  # of the batches, and the number of rows


def _open(path: Path) -> _Mapped:
    """Maps an Arrow file, of the stream format as `datasets` writes or of the file format."""
    with pyarrow.memory_map(str(path)) as source:
        try:
            reader = pyarrow.ipc.open_stream(source)
            batches = list(reader)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            file = pyarrow.ipc.open_file(source)
            batches = [file.get_batch(number) for number in range(file.num_record_batches)]
    return _Mapped(batches, [0, *accumulate(batch.num_rows for batch in batches)])


def read_rows(path: Path, columns: Columns, problems: Problems) -> Iterator[tuple[int, dict[str, object]]]:
    """Yields each row's number and the columns that are used, with a few rows in memory at a time."""
    if not is_table_file(path, problems):
        return
    try:
        mapped = _open(path)
        for start, batch in zip(mapped.starts, mapped.batches, strict=False):
            wanted = columns.used(path, batch.schema.names, problems)
            if not wanted:
                return
            used = batch.select(wanted)
            for first in range(0, used.num_rows, _BATCH_ROWS):
                part = used.slice(first, _BATCH_ROWS)
                part.validate(full=True)  # offsets of a damaged file may point outside of it
                for place, row in enumerate(part.to_pylist()):
                    yield start + first + place, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        problems.add(path, f"not a readable Arrow file: {error}")


def count_rows(path: Path) -> int:
    """Returns the number of rows; 0 if the file cannot be read, which `read_rows` reports."""
    try:
        require_regular(path, TABLE_BYTES)
        return _open(path).starts[-1]
    except (pyarrow.ArrowException, OSError):
        return 0


def cell_bytes(path: Path, row: int, column: str) -> bytes:
    """Returns the bytes of one image.

    Raises:
        OSError: the file is gone, or has changed so that the image is not there.
    """
    try:
        state = os.stat(path)
        mapped = _mapped(path, (state.st_ino, state.st_size, state.st_mtime_ns))
        batch = bisect_right(mapped.starts, row) - 1
        data = embedded_bytes(mapped.batches[batch][column][row - mapped.starts[batch]].as_py())
    except (pyarrow.ArrowException, IndexError, KeyError) as error:
        raise OSError(None, f"row {row} is not there anymore: {error}") from error
    if data is None:
        raise OSError(None, f"row {row} has no image anymore")
    return data


@lru_cache(maxsize=64)
def _mapped(path: Path, version: tuple[int, int, int]) -> _Mapped:
    return _open(path)
