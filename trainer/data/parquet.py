"""Reads parquet files as `datasets` writes them: a column of images and a column of captions."""

from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from halfbyte.trainer.data.captions import CAPTION_COLUMNS, Problems

IMAGE_COLUMN = "image"


def read_rows(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, object]]]:
    """Yields each row's number and its image and caption columns, with one row group in memory at a time."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = set(file.schema_arrow.names)
            if IMAGE_COLUMN not in columns or not columns & set(CAPTION_COLUMNS):
                found = ", ".join(map(repr, file.schema_arrow.names)) or "none"
                problems.add(path, f"found the columns {found}, expected image and text (or caption)")
                return
            wanted = [name for name in file.schema_arrow.names if name in {IMAGE_COLUMN, *CAPTION_COLUMNS}]
            number = 0
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group, columns=wanted).to_pylist():
                    yield number, row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        problems.add(path, f"not a readable parquet file: {error}")


def embedded_bytes(image: object) -> bytes | None:
    """Returns the bytes of an image cell, plain or in a struct of bytes and path; None if it has only a path."""
    if isinstance(image, dict):
        image = image.get("bytes")
    return image if isinstance(image, bytes) else None


def picture_bytes(path: Path, row: int) -> bytes:
    """Returns the bytes of the image in one row. Reads and caches whole row groups, for the neighboring rows."""
    starts = _group_starts(path)
    group = bisect_right(starts, row) - 1
    data = embedded_bytes(_images(path, group)[row - starts[group]])
    assert data is not None, "rows without bytes are no samples"
    return data


@lru_cache(maxsize=64)
def _group_starts(path: Path) -> list[int]:
    with pyarrow.parquet.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    return [0, *accumulate(sizes)][:-1]


@lru_cache(maxsize=2)
def _images(path: Path, group: int) -> list[object]:
    with pyarrow.parquet.ParquetFile(path) as file:
        images: list[object] = file.read_row_group(group, columns=[IMAGE_COLUMN])[IMAGE_COLUMN].to_pylist()
    return images
