"""Images in tables: parquet files, and Arrow files of saved data sets."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from halfbyte.trainer.data.archives import parquet, saved
from halfbyte.trainer.data.archives.columns import Columns, embedded_bytes
from halfbyte.trainer.data.records.problems import Problems
from halfbyte.trainer.data.records.sample import Place
from halfbyte.trainer.data.sources.captions import UNREADABLE, captions_of
from halfbyte.trainer.data.sources.folder import is_inside
from halfbyte.trainer.data.sources.found import Found
from halfbyte.trainer.data.sources.left_out import LeftOut
from halfbyte.trainer.wording import shown


@dataclass(frozen=True)
class TableSource:
    """The rows of tables."""

    root: Path
    shards: Sequence[Path]
    columns: Columns

    @cached_property
    def total(self) -> int:
        """The number of rows."""
        return sum(_format(shard).count_rows(shard) for shard in self.shards)

    def items(self, shard: Path, problems: Problems, left_out: LeftOut) -> Iterator[Found]:
        """Yields the images of a table, see `Source`."""
        for number, row in _format(shard).read_rows(shard, self.columns, problems):
            where = f"{shard} row {number}"
            texts: tuple[str, ...] | None = ()
            if self.columns.captions_needed or any(name in row for name in self.columns.captions):
                texts = captions_of(where, row, problems, self.columns.captions)
            place = self._place(shard, number, row[self.columns.image], where, problems)
            if place is None:
                continue
            mask = None if self.columns.mask is None else row.get(self.columns.mask)
            mask_data = embedded_bytes(mask)
            yield Found(
                place,
                UNREADABLE if texts is None else texts,
                None if mask_data is None else Place(shard, number, self.columns.mask or ""),
                embedded_bytes(row[self.columns.image]),
                mask_data,
            )

    def _place(self, shard: Path, number: int, image: object, where: str, problems: Problems) -> Place | None:
        """Returns the place of a row's image, in the table or in a file; None after adding a problem."""
        if embedded_bytes(image) is not None:
            return Place(shard, number, self.columns.image)
        name = image.get("path") if isinstance(image, dict) else None
        picture = shard.parent / name if isinstance(name, str) and "\0" not in name else None
        if picture is None:
            problems.add(where, f"{self.columns.image}: contains neither bytes nor a path")
        elif not is_inside(self.root, picture):
            problems.add(
                where, f"names {shown(name)}, which is outside {self.root}; embed the image's bytes instead"
            )
        elif not os.path.isfile(picture):
            problems.add(where, f"names a missing image, {shown(name)}")
        else:
            return Place(picture)
        return None


def _format(shard: Path):  # type: ignore[no-untyped-def]  # a module
    return saved if shard.suffix == saved.SUFFIX else parquet
