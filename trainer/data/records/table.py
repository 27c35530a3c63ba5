"""The table of a data set's images: an Arrow file, mapped into memory, with one row for each image.

It keeps what is learned by reading an image completely (its size, its SHA-256, problems), so that a million images are
read once and not at every start. The rows are followed by a trailer: JSON with the shards that the rows came from, its
length, and the CRC-32 of everything before.
"""

import json
import logging
import mmap
import os
import struct
import tempfile
import time
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy
import pyarrow  # type: ignore[import-untyped]
from numpy.typing import NDArray

from halfbyte.quant.files.atomic import make_folder, replaced
from halfbyte.trainer.errors import DiskError

log = logging.getLogger(__name__)

_FORMAT = 1
_BATCH_ROWS = 4096
_SETTLED = 2 * 10**9  # nanoseconds after which every file system shows a change as another time
_TAIL = struct.Struct("<QI8s")  # length of the trailer, CRC-32, magic
_MAGIC = b"halfrows"

_DIGEST = pyarrow.binary(32)
_SCHEMA = pyarrow.schema(
    [
        ("file", pyarrow.binary()),
        ("row", pyarrow.int64()),
        ("part", pyarrow.binary()),
        ("start", pyarrow.int64()),
        ("size", pyarrow.int64()),
        ("captions", pyarrow.list_(pyarrow.string())),
        ("width", pyarrow.int32()),
        ("height", pyarrow.int32()),
        ("sha256", _DIGEST),
        ("misnamed", pyarrow.bool_()),
        ("problem", pyarrow.string()),
        ("mask_file", pyarrow.binary()),
        ("mask_part", pyarrow.binary()),
        ("mask_start", pyarrow.int64()),
        ("mask_size", pyarrow.int64()),
        ("mask_sha256", _DIGEST),
        ("stamp", pyarrow.string()),
        ("mask_stamp", pyarrow.string()),
    ]
)


class Row(NamedTuple):
    """One image of the table. Files are relative to the source's folder."""

    file: str
    row: int | None
    part: str
    start: int | None
    size: int
    captions: Sequence[str]
    width: int
    height: int
    sha256: bytes  # 32 zeros if there is a problem
    misnamed: bool
    problem: str | None  # the reason that the image cannot be used
    mask_file: str | None = None  # None with a digest: the image's transparency
    mask_part: str = ""
    mask_start: int | None = None
    mask_size: int = 0
    mask_sha256: bytes | None = None  # None: no mask
    stamp: str | None = None  # of the file, see `stamp_of`; None: read it again at the next start
    mask_stamp: str | None = None


@dataclass(frozen=True)
class Shard:
    """A file of many images whose rows are used again while the file is unchanged."""

    file: str
    stamp: str
    first: int  # row
    count: int  # rows
    left_out: Sequence[
        tuple[str, str, int]
    ] = ()  # reason, first name and number of images that are not trained


def _packed(row: Row) -> tuple[Any, ...]:
    """Returns a row's values for the table: names of files as bytes, because they need not be UTF-8."""
    mask_file = None if row.mask_file is None else os.fsencode(row.mask_file)
    return (
        os.fsencode(row.file),
        row.row,
        os.fsencode(row.part),
        *row[3:11],
        mask_file,
        os.fsencode(row.mask_part),
        *row[13:],
    )


def _row(values: Iterable[Any]) -> Row:
    row = Row(*values)
    mask_file = None if row.mask_file is None else os.fsdecode(row.mask_file)
    return row._replace(
        file=os.fsdecode(row.file),
        part=os.fsdecode(row.part),
        mask_file=mask_file,
        mask_part=os.fsdecode(row.mask_part),
    )


def stamp_of(path: Path) -> str | None:
    """Returns the size and the time of the last change of a file, as one text.

    None if the file is too new or cannot be read: a change within the clock's resolution would not be noticed.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    too_new = time.time_ns() - status.st_mtime_ns < _SETTLED
    return None if too_new else f"{status.st_size} {status.st_mtime_ns}"


class Table:
    """The rows of a data set, mapped into memory."""

    def __init__(self, rows: pyarrow.RecordBatchFileReader, shards: Sequence[Shard]) -> None:
        self._batches = [rows.get_batch(number) for number in range(rows.num_record_batches)]
        self._starts = [0, *accumulate(batch.num_rows for batch in self._batches)]
        self.shards = {shard.file: shard for shard in shards}

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, number: int) -> Row:
        """Returns one row."""
        place = bisect_right(self._starts, number) - 1
        batch, inner = self._batches[place], number - self._starts[place]
        return _row(column[inner].as_py() for column in batch.columns)

    def rows(self, first: int, stop: int) -> Iterator[Row]:
        """Yields the rows from `first` to `stop` (exclusive); a few thousand are in memory at a time."""
        for batch in self.batches(first, stop):
            yield from map(_row, zip(*(column.to_pylist() for column in batch.columns), strict=True))

    def batches(self, first: int, stop: int) -> Iterator[pyarrow.RecordBatch]:
        """Yields parts of the table, without a copy."""
        for start, batch in zip(self._starts, self._batches, strict=False):
            low, high = max(first - start, 0), min(stop - start, batch.num_rows)
            if low < high:
                yield batch.slice(low, high - low)

    def column(self, name: str) -> pyarrow.ChunkedArray:
        """Returns one column of all rows, without a copy."""
        kind = _SCHEMA.field(name).type
        return pyarrow.chunked_array([batch[name] for batch in self._batches], kind)

    def digests(self) -> NDArray[numpy.bytes_]:
        """Returns the SHA-256 of all images, 32 bytes each."""
        chunks = self.column("sha256").chunks
        parts = [
            numpy.frombuffer(chunk.buffers()[1], "S32", len(chunk), 32 * chunk.offset) for chunk in chunks
        ]
        return numpy.concatenate([numpy.empty(0, "S32"), *parts])


class TableWriter:
    """Writes rows one after the other. See `writing`."""

    def __init__(self, file: BinaryIO) -> None:
        self._checked = _Checked(file)
        self._sink = pyarrow.PythonFile(self._checked, mode="w")
        self._writer = pyarrow.ipc.new_file(self._sink, _SCHEMA)
        self._waiting: list[Row] = []
        self._written = 0
        self.shards: list[Shard] = []

    def __len__(self) -> int:
        return self._written + len(self._waiting)

    def add(self, row: Row) -> None:
        """Adds a row."""
        self._waiting.append(row)
        if len(self._waiting) == _BATCH_ROWS:
            self._flush()

    def copy(self, table: Table, first: int, count: int) -> None:
        """Adds rows of another table."""
        self._flush()
        for batch in table.batches(first, first + count):
            self._writer.write_batch(batch)
            self._written += batch.num_rows

    def _flush(self) -> None:
        # Emptied first, so that a signal in between loses rows rather than writing them twice.
        waiting, self._waiting = self._waiting, []
        if waiting:
            columns = zip(*map(_packed, waiting), strict=True)
            arrays = [
                pyarrow.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)
            ]
            self._writer.write_batch(pyarrow.record_batch(arrays, schema=_SCHEMA))
            self._written += len(waiting)

    def finish(self) -> None:
        """Writes the rest and the trailer."""
        self._flush()
        self._writer.close()
        self._sink.flush()
        head = {"format": _FORMAT, "shards": [astuple(shard) for shard in self.shards]}
        trailer = json.dumps(head).encode()
        self._checked.write(trailer)
        self._checked.write(_TAIL.pack(len(trailer), self._checked.value, _MAGIC))
        self._checked.flush()


class _Checked:
    """A file that computes the CRC-32 of what is written."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.value = 0

    def write(self, data: Any) -> int:
        self.value = zlib.crc32(data, self.value)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


@contextmanager
def writing(path: Path | None) -> Iterator[tuple[TableWriter, BinaryIO]]:
    """Yields a writer and its file; at the end the table replaces `path`. None: a temporary file.

    Read the table from the file with `read_table` after `TableWriter.finish`.

    Raises:
        DiskError: the file cannot be written.
    """
    try:
        if path is None:
            with tempfile.TemporaryFile() as file:
                yield TableWriter(file), file
        else:
            make_folder(path.parent)
            with replaced(path) as file:
                yield TableWriter(file), file
    except OSError as error:
        folder = tempfile.gettempdir() if path is None else path.parent
        raise DiskError(
            f"cannot write the table of images in {folder}: {error.strerror or error}; free space, or set"
            " data.cache_dir to a folder on a larger disk"
        ) from error


def open_table(path: Path) -> Table | None:
    """Opens a table; None if there is none, or with a warning if it is damaged."""
    try:
        with path.open("rb") as file:
            return read_table(file)
    except (FileNotFoundError, OtherFormat):
        return None
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        log.warning("%s is damaged (%s); the images are read again", path, error)
        return None


class OtherFormat(ValueError):
    """The table is of another version."""


def read_table(file: BinaryIO) -> Table:
    """Maps a table into memory and verifies it; the file may be closed or replaced after that.

    Raises:
        OtherFormat: it was written by another version.
        OSError, ValueError: it cannot be read, or is not what was written.
    """
    size = os.fstat(file.fileno()).st_size
    if size < _TAIL.size:
        raise ValueError(f"it has {size} bytes")
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    view = memoryview(mapped)
    length, crc, magic = _TAIL.unpack(view[-_TAIL.size :])
    body, trailer = view[: -_TAIL.size - length], view[-_TAIL.size - length : -_TAIL.size]
    if magic != _MAGIC or zlib.crc32(view[: -_TAIL.size]) != crc:
        raise ValueError("its checksum does not match")
    mapped.madvise(mmap.MADV_DONTNEED)  # so that pages that were only verified do not count as memory in use
    head = json.loads(bytes(trailer))
    rows = pyarrow.ipc.open_file(pyarrow.py_buffer(body))
    if head["format"] != _FORMAT or rows.schema != _SCHEMA:
        raise OtherFormat
    return Table(rows, [Shard(*shard) for shard in head["shards"]])
