"""Finds reference images in the columns of a data set's tables: parquet files, metadata.jsonl and metadata.csv."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]

from halfbyte.trainer.data.archives.columns import IMAGE_COLUMN, embedded_bytes
from halfbyte.trainer.data.archives.reference_columns import (
    ReferencePlace,
    Row,
    cells_of,
    parquet_columns,
    parquet_row,
    parquet_rows,
    path_in,
    usual_columns,
)
from halfbyte.trainer.data.records.problems import Problems
from halfbyte.trainer.data.records.sample import Cell, Sample
from halfbyte.trainer.data.references.files import visible_files
from halfbyte.trainer.data.sources.captions import METADATA_NAMES, metadata_rows
from halfbyte.trainer.data.sources.folder import is_inside
from halfbyte.trainer.wording import shown

_USUAL = "reference, references, or ref0, ref1 and so on"


@dataclass(frozen=True)
class _Row:
    """One row of a table, with the columns that hold references."""

    where: str
    table: Path
    number: int | None  # in a parquet file
    values: Row
    columns: Sequence[str]

    @property
    def cells(self) -> list[tuple[Cell, object]]:
        """Its references, without empty cells at the end."""
        cells = cells_of(self.values, self.columns)
        while cells and cells[-1][1] in (None, ""):
            cells.pop()
        return cells


class ReferenceTables:
    """The reference images in the tables of a data set."""

    def __init__(
        self, path: Path, wanted: Sequence[str], problems: Problems, image: str | None = None
    ) -> None:
        """Reads the tables of the data set at `path`; `wanted` are the columns, empty for those with usual names."""
        self._root = path if path.is_dir() else path.parent
        self._wanted = wanted
        self._image = image or IMAGE_COLUMN
        self._rows: dict[Path, _Row] = {}  # by the file of the image
        self._parquet: dict[Path, Sequence[str]] = {}  # columns with references, by table
        for table in visible_files(path) if path.is_dir() else [path]:
            if table.name in METADATA_NAMES:
                self._add_metadata(table)
            elif table.suffix == ".parquet":
                self._add_parquet(table, problems)

    def of(self, sample: Sample, problems: Problems) -> list[ReferencePlace]:
        """Returns the places of an image's references, in order; none if it has none, or after adding a problem."""
        row = (
            self._rows.get(sample.path) if sample.row is None else self._parquet_row(sample.path, sample.row)
        )
        if row is None:
            return []
        places = [self._place(row, cell, value, problems) for cell, value in row.cells]
        found = [place for place in places if place is not None]
        return found if len(found) == len(places) else []

    def wanted(self, sample: Sample) -> str:
        """Describes what is expected of an image without references."""
        return f"expected one in {self._names} of its row"

    @property
    def files(self) -> frozenset[Path]:
        """The files that rows name as references, unless they have rows of their own and are trained as well."""
        named = {
            _joined(row.table.parent, name)
            for row in self._rows.values()
            for _, value in row.cells
            if (name := path_in(value)) is not None
        }
        return frozenset(named - self._rows.keys())

    @property
    def _names(self) -> str:
        return f"the columns {', '.join(self._wanted) or _USUAL}"

    def _parquet_row(self, table: Path, number: int) -> _Row:
        columns = self._parquet[table]
        return _Row(f"{table} row {number}", table, number, parquet_row(table, number, columns), columns)

    def _place(self, row: _Row, cell: Cell, value: object, problems: Problems) -> ReferencePlace | None:
        where = f"{row.where}, {cell.column}"
        if embedded_bytes(value) is not None and row.number is not None:
            return ReferencePlace(row.table, row.number, cell)
        name = path_in(value)
        if name is None:
            problems.add(where, f"got {shown(value)}, expected an image or the path of one")
            return None
        file = _joined(row.table.parent, name)
        if not is_inside(self._root, file):
            problems.add(where, f"names {shown(name)}, which is outside {self._root}; move the image inside")
        elif not os.path.isfile(file):
            problems.add(where, f"names a missing image, {shown(name)}")
        else:
            return ReferencePlace(file)
        return None

    def _add_metadata(self, table: Path) -> None:
        unread = Problems()  # the reader of captions reports these
        for where, row in metadata_rows(table, unread):
            name = row.get("file_name")
            if isinstance(name, str) and name.strip():
                columns = self._wanted or usual_columns(row)
                self._rows[_joined(table.parent, name.strip())] = _Row(where, table, None, row, columns)

    def _add_parquet(self, table: Path, problems: Problems) -> None:
        try:
            names = parquet_columns(table)
            columns = self._wanted or usual_columns(names)
            if not columns or not set(columns) <= set(names):
                listed = ", ".join(map(shown, names[:20]))
                problems.add(table, f"found the columns {listed}, expected reference images in {self._names}")
                return
            self._parquet[table] = columns
            if self._image not in names:
                return  # the reader of images reports it
            for number, row in enumerate(parquet_rows(table, [self._image, *columns])):
                image = row[self._image]
                if embedded_bytes(image) is not None:
                    return  # this table holds its images; the references of a row are read when they are needed
                if (name := path_in(image)) is not None:
                    where = f"{table} row {number}"
                    self._rows[_joined(table.parent, name)] = _Row(where, table, number, row, columns)
        except (pyarrow.ArrowException, OSError) as error:
            problems.add(table, f"not a readable parquet file: {error}")


def _joined(folder: Path, name: str) -> Path:
    return Path(os.path.normpath(folder / name))
