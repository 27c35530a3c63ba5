"""Reads parquet files as `datasets` writes them: a column of images and a column of captions."""

from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from halfbyte.quant.files.regular import require_regular
from halfbyte.trainer.data.sources.captions import CAPTION_COLUMNS, Problems
from halfbyte.trainer.wording import shown

IMAGE_COLUMN = "image"

_FILE_BYTES = 2**50  # only what a file is matters here; a row group is the unit that is read
_GROUP_BYTES = 2 * 10**9
_BATCH_ROWS = 16


def read_rows(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, object]]]:
    """Yields each row's number and its image and caption columns, with a few rows in memory at a time."""
    try:
        require_regular(path, _FILE_BYTES)
    except OSError as error:
        problems.add(path, f"cannot be read: {error.strerror}")
        return
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = set(file.schema_arrow.names)
            if IMAGE_COLUMN not in columns or not columns & set(CAPTION_COLUMNS):
                found = ", ".join(map(shown, file.schema_arrow.names[:20])) or "none"
                problems.add(path, f"found the columns {found}, expected image and text (or caption)")
                return
            wanted = [name for name in file.schema_arrow.names if name in {IMAGE_COLUMN, *CAPTION_COLUMNS}]
            groups = range(file.num_row_groups)
            for group in groups:
                size = _decoded_bytes(file.metadata.row_group(group))
                if size > _GROUP_BYTES:
                    problems.add(path, _too_large(group, size))
                    return
            number = 0
            for group in groups:
                held = 0  # bytes of the group's images; a dictionary may store many equal ones as one
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=wanted):
                    for row in batch.to_pylist():
                        held += len(embedded_bytes(row[IMAGE_COLUMN]) or b"")
                        yield number, row
                        number += 1
                    if held > _GROUP_BYTES:
                        problems.add(path, _too_large(group, held))
                        return
    except (pyarrow.ArrowException, OSError) as error:
        problems.add(path, f"not a readable parquet file: {error}")


def _too_large(group: int, size: int) -> str:
    return (
        f"row group {group} has at least {size:,} bytes of images and captions, expected at most {_GROUP_BYTES:,};"
        " write it with fewer rows in each group, such as to_parquet(..., batch_size=100)"
    )


def _decoded_bytes(group: pyarrow.parquet.RowGroupMetaData) -> int:
    """Returns the size of a row group's images and captions after decompression, without reading them."""
    chunks = (group.column(number) for number in range(group.num_columns))
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema.partition(".")[0] in {IMAGE_COLUMN, *CAPTION_COLUMNS}
    )


def embedded_bytes(image: object) -> bytes | None:
    """Returns the bytes of an image cell, plain or in a struct of bytes and path; None if it has only a path."""
    if isinstance(image, dict):
        image = image.get("bytes")
    return image if isinstance(image, bytes) else None


def picture_bytes(path: Path, row: int) -> bytes:
    """Returns the bytes of the image in one row. Reads and caches whole row groups, for the neighboring rows."""
    starts = _group_starts(path)
    group = bisect_right(starts, row) - 1
    data = embedded_bytes(_images(path, group)[row - starts[group]].as_py())
    assert data is not None, "rows without bytes are no samples"
    return data


@lru_cache(maxsize=64)
def _group_starts(path: Path) -> list[int]:
    with pyarrow.parquet.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    return [0, *accumulate(sizes)][:-1]


@lru_cache(maxsize=2)
def _images(path: Path, group: int) -> pyarrow.ChunkedArray:
    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[IMAGE_COLUMN])[IMAGE_COLUMN]
