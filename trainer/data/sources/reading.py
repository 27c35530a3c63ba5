"""Reads all images of a data set, checks them, and keeps what was learned in a table for the next start."""

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy

from halfbyte.quant.files.digest import sha256_of
from halfbyte.trainer.data.pictures.decode import (
    DECODE_ERRORS,
    decoded_size,
    has_misnamed_profile,
    upright_size,
)
from halfbyte.trainer.data.pictures.mask import has_alpha
from halfbyte.trainer.data.records.problems import Problems
from halfbyte.trainer.data.records.records import Records, place_in
from halfbyte.trainer.data.records.table import (
    Row,
    Shard,
    Table,
    TableWriter,
    open_table,
    read_table,
    stamp_of,
    writing,
)
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.contents import read_bytes
from halfbyte.trainer.data.sources.found import Found, Source, SourceSettings
from halfbyte.trainer.data.sources.left_out import DAMAGED, LeftOut
from halfbyte.trainer.data.sources.masks import mask_problem, wanted_mask
from halfbyte.trainer.data.sources.opening import open_source
from halfbyte.trainer.data.sources.texts import check_texts
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.runtime.progress import OnProgress
from halfbyte.trainer.wording import printable

log = logging.getLogger(__name__)

_PLAIN = CaptionStyle()
_DEFAULTS = SourceSettings()
_NO_DIGEST = bytes(32)
# Pillow and hashing let other threads run. More of them would hold more decoded images in memory.
_THREADS = min(8, os.cpu_count() or 1)
_AHEAD = 3 * _THREADS  # images that are read or wait to be added
_LARGE = 20_000_000  # pixels of images that are decoded one at a time, 60 MB each


def read_samples(
    path: Path | str,
    style: CaptionStyle = _PLAIN,
    settings: SourceSettings = _DEFAULTS,
    *,
    is_decoded: Callable[[str], bool] = lambda sha256: False,
    progress: OnProgress | None = None,
    left_out: LeftOut | None = None,
) -> Records:
    """Reads the samples at `path`, sorted by path, in tables and tar files by row and by name.

    Every image is decoded once, so that a corrupt one fails at start-up, not mid-run. Files that have not changed since
    they were read for `settings.tables` are not read again. Symbolic links out of the folder are refused.

    Args:
        style: applied to every caption. If it adds text, images need no caption.
        is_decoded: returns True for the SHA-256 of an image that has been decoded before and need not be again.
        left_out: gets the images that are not for training, such as masks.

    Raises:
        DataError: with one line per problem, or if no image is left.
    """
    root = Path(path)
    if ".." in root.parts:
        root = root.resolve()  # captions are looked up by normalized path
    problems = Problems(most=settings.most_problems)
    style.check(problems)
    left_out = LeftOut() if left_out is None else left_out
    source = open_source(root, settings, style, problems, left_out)
    if source is None:
        raise DataError(str(problems))
    reader = _Reader(source, settings, is_decoded, problems, left_out, progress)
    table = reader.table(_file_of(root, style, settings))
    if source.shards:
        check_texts(table, source.root, style, problems)
    return _usable(table, source, style, settings, problems, left_out)


def _file_of(path: Path, style: CaptionStyle, settings: SourceSettings) -> Path | None:
    """Returns the file that keeps the table of a source; None if it is not kept."""
    if settings.tables is None:
        return None
    masks = settings.masks
    made_from = [str(path), style.lines, settings.image_column, settings.caption_column]
    made_from += [settings.split, settings.config]
    made_from += [masks.source, None if masks.folder is None else str(masks.folder), style.gives_text]
    return settings.tables / f"{sha256_of(json.dumps(made_from))[:32]}.arrow"


class _Read(NamedTuple):
    """What was learned of one image."""

    row: Row
    unread: bool = False  # it could not be read, which may succeed at the next start
    problem: tuple[str, str] | None = None  # where and what, of its mask


class _Reader:
    """Makes the table of a source."""

    def __init__(
        self,
        source: Source,
        settings: SourceSettings,
        is_decoded: Callable[[str], bool],
        problems: Problems,
        left_out: LeftOut,
        progress: OnProgress | None,
    ) -> None:
        self._source = source
        self._settings = settings
        self._is_decoded = is_decoded
        self._problems = problems
        self._left_out = left_out
        self._progress = progress
        self._unread = 0  # images that could not be read
        self._one_large = Lock()

    def table(self, file: Path | None) -> Table:
        """Returns the table of all images; reads only those that the table in `file` lacks, and replaces it."""
        known = None if file is None else open_table(file)
        if known is not None and self._is_current(known):
            return known
        interrupted = None
        with writing(file if self._settings.renew else None) as (writer, stream):
            try:
                self._fill(writer, known)
            except KeyboardInterrupt as error:  # also Stopped, by a signal
                if known is not None and len(known) > len(writer):
                    raise
                interrupted = error  # after keeping what has been read
            writer.finish()
            table = read_table(stream)
        if interrupted is not None:
            raise interrupted
        return table

    def _is_current(self, known: Table) -> bool:
        """Returns True if a table has exactly the shards of the source, and none has changed."""
        shards = {_relative(self._source.root, shard): shard for shard in self._source.shards}
        if not shards or list(known.shards) != list(shards):
            return False
        if sum(old.count for old in known.shards.values()) != len(known):
            return False
        if not all(_is_current(old.stamp, shards[name]) for name, old in known.shards.items()):
            return False
        for old in known.shards.values():
            self._left_out.add_groups(old.left_out)
        return True

    def _fill(self, writer: TableWriter, known: Table | None) -> None:
        if not self._source.shards:
            self._add_all(writer, self._source.root, _Known(known))
            return
        for shard in self._source.shards:
            name, stamp = _relative(self._source.root, shard), stamp_of(shard)
            old = None if known is None else known.shards.get(name)
            if known is not None and old is not None and stamp is not None and old.stamp == stamp:
                first = len(writer)
                writer.copy(known, old.first, old.count)
                writer.shards.append(Shard(name, stamp, first, old.count, old.left_out))
                self._left_out.add_groups(old.left_out)
                continue
            first, before, own = len(writer), len(self._problems), LeftOut()
            settled = self._add_all(writer, shard, _Known(None), own)
            groups = own.groups()
            self._left_out.add_groups(groups)
            if stamp is not None and settled and len(self._problems) == before:
                writer.shards.append(Shard(name, stamp, first, len(writer) - first, groups))

    def _add_all(
        self, writer: TableWriter, shard: Path, known: "_Known", left_out: LeftOut | None = None
    ) -> bool:
        """Adds the images of one shard, or of the folder. Returns True if all could be read."""
        unread = self._unread
        left_out = self._left_out if left_out is None else left_out
        for read in self._in_order(self._source.items(shard, self._problems, left_out), known):
            writer.add(read.row)
            self._unread += read.unread
            if read.problem is not None:
                self._problems.add(*read.problem)
            if self._progress is not None:
                done = len(writer)
                self._progress(done, max(done, self._source.total))
        return self._unread == unread

    def _in_order(self, items: Iterator[Found], known: "_Known") -> Iterator[_Read]:
        """Yields what is known or read of each image, in order. Threads read several at once."""
        pool = ThreadPoolExecutor(_THREADS)
        waiting: deque[Future[_Read] | _Read] = deque()
        try:
            for item in items:
                row = known.row(self._source.root, item)
                if row is not None:
                    waiting.append(_Read(row))
                elif item.data is None and not _is_file(item):
                    waiting.append(self._read(item))  # readers of tables keep what they read last
                else:
                    waiting.append(pool.submit(self._read, item))
                if len(waiting) >= _AHEAD:
                    yield _result(waiting.popleft())
            while waiting:
                yield _result(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, item: Found) -> _Read:
        """Reads, checks and describes one image."""
        root, place = self._source.root, item.place
        stamp = stamp_of(place.file) if _is_file(item) else None
        row = Row(
            _relative(root, place.file), place.row, place.part, place.start, place.size, item.captions,
            0, 0, _NO_DIGEST, False, None,
        )  # fmt: skip
        try:
            data = read_bytes(place) if item.data is None else item.data
        except OSError as error:
            return _Read(row._replace(problem=f"cannot be read: {error.strerror}"), unread=True)
        sha256 = sha256_of(data)
        try:
            width, height = self._size(data, sha256)
            misnamed = has_misnamed_profile(data)
        except DECODE_ERRORS as error:
            return _Read(row._replace(problem=_undecodable(data, error)))
        row = row._replace(
            width=width, height=height, sha256=bytes.fromhex(sha256), misnamed=misnamed, stamp=stamp
        )
        return self._with_mask(row, item, data)

    def _size(self, data: bytes, sha256: str) -> tuple[int, int]:
        """Returns width and height of an image, which it decodes unless it has been decoded before."""
        width, height = upright_size(data)
        if self._is_decoded(sha256):
            return width, height
        if width * height <= _LARGE:
            return decoded_size(data)
        with self._one_large:
            return decoded_size(data)

    def _with_mask(self, row: Row, item: Found, data: bytes) -> _Read:
        size, unread = (row.width, row.height), False
        if self._settings.masks.source == "alpha":
            if not has_alpha(data):
                return _Read(row)
            problem = mask_problem(data, item.place, size, alpha=True)
            row, where = row._replace(mask_sha256=row.sha256), item.place
        elif item.mask is None:
            return _Read(row)
        else:
            where = item.mask
            stamp = stamp_of(where.file) if _is_file(item) else None
            try:
                mask = read_bytes(where) if item.mask_data is None else item.mask_data
                problem = mask_problem(mask, item.place, size, alpha=False)
            except OSError as error:
                unread = True
                mask, problem = b"", f"cannot be read: {error.strerror}"
            row = row._replace(
                mask_file=_relative(self._source.root, where.file),
                mask_part=where.part,
                mask_start=where.start,
                mask_size=where.size,
                mask_sha256=bytes.fromhex(sha256_of(mask)),
                mask_stamp=stamp,
            )
        if problem is None:
            return _Read(row, unread)
        # The image is read again when the mask is replaced.
        return _Read(row._replace(stamp=None), unread, (str(where.where), problem))


def _result(read: "Future[_Read] | _Read") -> _Read:
    return read.result() if isinstance(read, Future) else read


def _undecodable(data: bytes, error: Exception) -> str:
    if not data:
        return "is empty (0 bytes)"
    return f"cannot be decoded: {error}; replace or remove it"


def _is_file(item: Found) -> bool:
    """Returns True for an image in a file of its own."""
    return item.place.row is None and item.place.start is None


def _relative(root: Path, file: Path) -> str:
    return os.path.relpath(file, root) if not file.is_relative_to(root) else file.relative_to(root).as_posix()


class _Known:
    """The rows of the images of a folder at the last start, for files that have not changed.

    Both are in the order of names, so they are walked through side by side.
    """

    def __init__(self, table: Table | None) -> None:
        self._rows: Iterator[Row] = iter(()) if table is None else table.rows(0, len(table))
        self._next = next(self._rows, None)

    def row(self, root: Path, item: Found) -> Row | None:
        """Returns the row of an image, with its present captions; None if it must be read."""
        if self._next is None or not _is_file(item):
            return None
        name = _relative(root, item.place.file)
        while self._next is not None and self._next.file < name:
            self._next = next(self._rows, None)
        row = self._next
        if row is None or row.file != name or row.problem is not None:
            return None
        mask = None if item.mask is None else _relative(root, item.mask.file)
        if mask != row.mask_file or not _is_current(row.stamp, item.place.file):
            return None
        if item.mask is not None and not _is_current(row.mask_stamp, item.mask.file):
            return None
        return row._replace(captions=item.captions)


def _is_current(stamp: str | None, file: Path) -> bool:
    return stamp is not None and stamp == stamp_of(file)


def _usable(
    table: Table,
    source: Source,
    style: CaptionStyle,
    settings: SourceSettings,
    problems: Problems,
    left_out: LeftOut,
) -> Records:
    """Returns the samples without a problem; reports the others as the settings say."""
    root = source.root
    bad_rows = table.column("problem").is_valid().to_numpy()
    bad = Problems(most=settings.most_problems) if settings.skip_bad else problems
    for number in numpy.flatnonzero(bad_rows).tolist():
        row = table.row(number)
        where = place_in(root, row).where
        bad.add(where, row.problem or "")
        if settings.skip_bad:
            left_out.add(where, DAMAGED)
    masks = settings.masks
    if masks.source != "none" and masks.missing == "error":
        missing = ~bad_rows & table.column("mask_sha256").is_null().to_numpy()
        for number in numpy.flatnonzero(missing).tolist():
            place = place_in(root, table.row(number))
            wanted = wanted_mask(root, place, masks)
            problems.add(place.where, f"has no mask; {wanted}, or set masked_loss.missing: whole")
    if len(table) == 0 and not problems.lines:
        problems.add(root, "has no rows with images")
    if problems.lines:
        raise DataError(str(problems))
    usable = numpy.flatnonzero(~bad_rows)
    if len(usable) == 0:
        raise DataError(f"{printable(root)}: none of its {len(table)} images can be used:\n{bad}")
    if bad.lines:
        log.warning(
            "%d of %d images are skipped (data.on_bad_image: skip):\n  %s",
            len(bad),
            len(table),
            str(bad).replace("\n", "\n  "),
        )
    return Records(table, root, style.finished, data_set=settings.data_set, usable=usable)
