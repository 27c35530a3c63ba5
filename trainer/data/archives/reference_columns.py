"""Reads the reference images in the columns of parquet files, metadata.jsonl and metadata.csv."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from halfbyte.trainer.data.archives.columns import embedded_bytes
from halfbyte.trainer.data.records.sample import Cell

_NAMES = re.compile(r"references?|ref\d+")

Row = Mapping[str, object]


@dataclass(frozen=True)
class ReferencePlace:
    """Where a reference image is: a file, or a cell of a row of a parquet file."""

    path: Path
    row: int | None = None
    cell: Cell | None = None

    @property
    def where(self) -> str:
        """The place in messages."""
        return str(self.path) if self.cell is None else f"{self.path} row {self.row}, {self.cell.column}"


def usual_columns(columns: Iterable[str]) -> list[str]:
    """Returns those columns of a table whose names say that they hold references, in the order of the references."""
    usual = [name for name in columns if _NAMES.fullmatch(name)]
    return sorted(usual, key=lambda name: (not name.startswith("reference"), len(name), name))


def cells_of(row: Row, columns: Sequence[str]) -> list[tuple[Cell, object]]:
    """Returns a row's references as stored, with their places; None or an empty text stands for a missing one."""
    found: list[tuple[Cell, object]] = []
    for column in columns:
        value = row.get(column)
        values = value if isinstance(value, list) else [value]
        found += [(Cell(column, number), item) for number, item in enumerate(values)]
    return found


def path_in(value: object) -> str | None:
    """Returns the path in a cell that holds no image itself; None if it holds neither."""
    if isinstance(value, dict):
        value = value.get("path")
    return value if isinstance(value, str) and value and "\0" not in value else None


def parquet_columns(path: Path) -> list[str]:
    """Returns the names of a parquet file's columns."""
    return list(pyarrow.parquet.read_schema(path).names)


def parquet_row(path: Path, row: int, columns: Sequence[str]) -> Row:
    """Returns columns of one row of a parquet file. Reads and caches whole row groups, for the neighboring rows."""
    starts = _group_starts(path)
    group = bisect_right(starts, row) - 1
    table = _columns(path, group, tuple(columns))
    return {column: table[column][row - starts[group]].as_py() for column in columns}


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yields some columns of the rows of a parquet file, with a few rows in memory at a time."""
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(16, columns=list(columns)):
            yield from batch.to_pylist()


def reference_bytes(path: Path, row: int, cell: Cell) -> bytes:
    """Returns the bytes of a reference image inside a parquet file. Raises OSError."""
    found = dict(cells_of(parquet_row(path, row, [cell.column]), [cell.column]))
    data = embedded_bytes(found.get(cell))
    if data is None:
        raise OSError(None, f"row {row} has no image anymore")
    return data


@lru_cache(maxsize=64)
def _group_starts(path: Path) -> list[int]:
    with pyarrow.parquet.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    return [0, *accumulate(sizes)][:-1]


@lru_cache(maxsize=4)
def _columns(path: Path, group: int, columns: tuple[str, ...]) -> pyarrow.Table:
    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=list(columns))
