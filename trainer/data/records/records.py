"""The samples of a data set as a sequence over its table: a Sample is made only when it is asked for."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy
from numpy.typing import NDArray

from halfbyte.trainer.data.records.sample import Mask, Place, Sample
from halfbyte.trainer.data.records.table import Row, Table

Numbers = NDArray[numpy.int64]


class Records(Sequence[Sample]):
    """The usable images of a table, or some of them. Takes 16 bytes of memory for each."""

    def __init__(
        self,
        table: Table,
        root: Path,
        finished: Callable[[str], str],
        *,
        data_set: int,
        usable: Numbers,
        chosen: Numbers | None = None,
    ) -> None:
        """`usable` are the rows without a problem, and `chosen` numbers among these; None: all.

        finished: returns the text to train with for a caption of the source.
        """
        self.table = table
        self.root = root
        self.data_set = data_set
        self._finished = finished
        self._usable = usable
        self._chosen = numpy.arange(len(usable)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> "Records": ...

    def __getitem__(self, place: int | slice) -> "Sample | Records":
        if isinstance(place, slice):
            return self.select(numpy.arange(len(self))[place])
        index = int(self._chosen[place])
        return self._sample(index, self.table.row(int(self._usable[index])))

    def __iter__(self) -> Iterator[Sample]:
        wanted = self._usable[self._chosen]
        if len(wanted) == 0:
            return
        if (numpy.diff(wanted) <= 0).any():  # not in the order of the table
            yield from (self[place] for place in range(len(self)))
            return
        first = int(wanted[0])
        place = 0
        for number, row in enumerate(self.table.rows(first, int(wanted[-1]) + 1), start=first):
            if number == wanted[place]:
                yield self._sample(int(self._chosen[place]), row)
                place += 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def select(self, places: Numbers) -> "Records":
        """Returns the samples at some places, in that order."""
        return Records(
            self.table,
            self.root,
            self._finished,
            data_set=self.data_set,
            usable=self._usable,
            chosen=self._chosen[places],
        )

    @property
    def indices(self) -> Numbers:
        """The `index` of each sample."""
        return self._chosen

    def numbers(self, column: str) -> NDArray[Any]:
        """Returns the values of a column of numbers, such as width, for each sample."""
        return self.table.column(column).to_numpy()[self._usable[self._chosen]]

    def digests(self) -> NDArray[numpy.bytes_]:
        """Returns the SHA-256 of each image, 32 bytes. They are in the order of their hexadecimal forms."""
        return self.table.digests()[self._usable[self._chosen]]

    def _sample(self, index: int, row: Row) -> Sample:
        captions = tuple(row.captions)
        place = place_in(self.root, row)
        return Sample(
            index,
            place.path,
            self._finished(captions[0] if captions else ""),
            row.width,
            row.height,
            row.sha256.hex(),
            row.row,
            row.misnamed,
            self.data_set,
            captions,
            _mask(self.root, row),
            part=row.part,
            start=row.start,
            size=row.size,
        )


def place_in(root: Path, row: Row) -> Place:
    """Returns the place of a row's image."""
    return Place(root / row.file, row.row, row.part, row.start, row.size)


def _mask(root: Path, row: Row) -> Mask | None:
    if row.mask_sha256 is None:
        return None
    if row.mask_file is None:
        return Mask(None, row.mask_sha256.hex())
    in_table = row.mask_part and row.mask_start is None
    place = Place(
        root / row.mask_file, row.row if in_table else None, row.mask_part, row.mask_start, row.mask_size
    )
    return Mask(place.path, row.mask_sha256.hex(), place.row, place.part, place.start, place.size)


def digests_of(samples: Sequence[Sample]) -> NDArray[numpy.bytes_]:
    """Returns the SHA-256 of each image, 32 bytes, without making samples where there is a table."""
    if isinstance(samples, Records):
        return samples.digests()
    return numpy.array([bytes.fromhex(sample.sha256) for sample in samples], "S32")


def selected(samples: Sequence[Sample], keep: NDArray[numpy.bool_]) -> Sequence[Sample]:
    """Returns the samples for which `keep` is true."""
    if isinstance(samples, Records):
        return samples.select(numpy.flatnonzero(keep))
    return [sample for sample, kept in zip(samples, keep.tolist(), strict=True) if kept]
