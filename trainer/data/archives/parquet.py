"""Reads parquet files as `datasets` writes them: columns of images, captions and masks."""

import os
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from halfbyte.trainer.data.archives.columns import Columns, embedded_bytes, is_table_file
from halfbyte.trainer.data.records.problems import Problems

SUFFIX = ".parquet"

_GROUP_BYTES = 2 * 10**9
_BATCH_ROWS = 16


def read_rows(path: Path, columns: Columns, problems: Problems) -> Iterator[tuple[int, dict[str, object]]]:
    """Yields each row's number and the columns that are used, with a few rows in memory at a time."""
    if not is_table_file(path, problems):
        return
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = columns.used(path, file.schema_arrow.names, problems)
            if not wanted:
                return
            groups = range(file.num_row_groups)
            for group in groups:
                size = _decoded_bytes(file.metadata.row_group(group), wanted)
                if size > _GROUP_BYTES:
                    problems.add(path, _too_large(group, size))
                    return
            number = 0
            for group in groups:
                held = 0  # bytes of the group's images; a dictionary may store many equal ones as one
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=wanted):
                    for row in batch.to_pylist():
                        held += len(embedded_bytes(row[columns.image]) or b"")
                        yield number, row
                        number += 1
                    if held > _GROUP_BYTES:
                        problems.add(path, _too_large(group, held))
                        return
    except (pyarrow.ArrowException, OSError) as error:
        problems.add(path, f"not a readable parquet file: {error}")


def count_rows(path: Path) -> int:
    """Returns the number of rows; 0 if the file cannot be read, which `read_rows` reports."""
    try:
        return int(pyarrow.parquet.read_metadata(path).num_rows)
    except (pyarrow.ArrowException, OSError):
        return 0


def _too_large(group: int, size: int) -> str:
    return (
        f"row group {group} has at least {size:,} bytes of images and captions, expected at most {_GROUP_BYTES:,};"
        " write it with fewer rows in each group, such as to_parquet(..., batch_size=100)"
    )


def _decoded_bytes(group: pyarrow.parquet.RowGroupMetaData, wanted: list[str]) -> int:
    """Returns the size of a row group's images and captions after decompression, without reading them."""
    chunks = (group.column(number) for number in range(group.num_columns))
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema in wanted or chunk.path_in_schema.partition(".")[0] in wanted
    )


def cell_bytes(path: Path, row: int, column: str) -> bytes:
    """Returns the bytes of one image. Reads and caches whole row groups, for the neighboring rows.

    Raises:
        OSError: the file is gone, or has changed so that the image is not there.
    """
    try:
        state = os.stat(path)
        version = (state.st_ino, state.st_size, state.st_mtime_ns)  # so that a changed file is read again
        starts = _group_starts(path, version)
        group = bisect_right(starts, row) - 1
        data = embedded_bytes(_images(path, version, group, column)[row - starts[group]].as_py())
    except (pyarrow.ArrowException, IndexError, KeyError) as error:
        raise OSError(None, f"row {row} is not there anymore: {error}") from error
    if data is None:
        raise OSError(None, f"row {row} has no image anymore")
    return data


_Version = tuple[int, int, int]


@lru_cache(maxsize=64)
def _group_starts(path: Path, version: _Version) -> list[int]:
    with pyarrow.parquet.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    return [0, *accumulate(sizes)][:-1]


@lru_cache(maxsize=2)
def _images(path: Path, version: _Version, group: int, column: str) -> pyarrow.ChunkedArray:
    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column])[column]
