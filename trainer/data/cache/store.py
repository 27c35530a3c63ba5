"""The shards of one folder, and where each entry is in them.

Where the entries are takes 56 bytes for each of them in memory, so that a million are no burden.
"""

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.trainer.data.cache.shard import INDEX, KEY_BYTES, SHARD, Entries, entries_of, read_payload

SUBJECT_BYTES = 16
"""Keys of entries that are made from one image, or one caption, begin with the same bytes."""
_DAMAGED = ".damaged"


class Place(NamedTuple):
    """Where an entry is."""

    shard: Path
    offset: int  # bytes, of its header
    length: int  # bytes of its payload

    def __str__(self) -> str:
        return f"{self.shard} at byte {self.offset}"


@dataclass(frozen=True)
class _Table:
    """All known entries, sorted by the first 8 bytes of their keys; of equal keys, the newest comes first."""

    shards: Sequence[Path] = ()  # from the oldest to the newest
    covered: Sequence[int] = ()  # bytes of each shard that are in the table
    first: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))  # bytes of the keys
    keys: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, KEY_BYTES), np.uint8))
    shard: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))  # the place in `shards`
    offset: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    length: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))
    damaged: frozenset[tuple[str, int]] = frozenset()  # names of shards and offsets

    def rows(self, start: bytes) -> list[int]:
        """Returns the rows of the keys that begin with these bytes, at least 8."""
        number = np.frombuffer(start[:8], "<u8")[0]
        first = int(np.searchsorted(self.first, number, side="left"))
        last = int(np.searchsorted(self.first, number, side="right"))
        wanted = np.frombuffer(start, np.uint8)
        same = (self.keys[first:last, : len(start)] == wanted).all(axis=1)
        return (first + np.flatnonzero(same)).tolist()


class ShardStore:
    """The entries in the shards of a folder, which need not exist. Other processes may add to it at any time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._table = _Table()
        self._seen: int | None = None  # the folder's time of change when it was listed
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return store_of, (self.folder,)

    def find(self, key: bytes) -> list[Place]:
        """Returns the places of an entry, the newest first. Does not look for new shards, see `refresh`."""
        table = self._table
        return [place for row in table.rows(key) if (place := self._place(table, row)) is not None]

    def has_subject(self, subject: bytes) -> bool:
        """Returns True if there are entries whose keys begin with these SUBJECT_BYTES bytes."""
        assert len(subject) == SUBJECT_BYTES
        self.refresh()
        return bool(self._table.rows(subject))

    def __len__(self) -> int:
        return len(self._table.first)

    def read(self, place: Place, key: bytes) -> bytes:
        """Reads an entry; see `read_payload`."""
        return read_payload(place.shard, key, place.offset, place.length)

    def note_damage(self, place: Place) -> None:
        """Notes that an entry is damaged, so that it counts as missing from now on, also at the next start."""
        with self._lock:
            noted = self._table.damaged | {(place.shard.name, place.offset)}
            self._table = _replaced(self._table, damaged=noted)
        with suppress(OSError):
            self.folder.joinpath(f"{place.shard.name}.{place.offset}{_DAMAGED}").touch()

    def refresh(self, *, again: bool = False) -> None:
        """Looks for new shards and entries if the folder has changed; `again`: even if it has not.

        A shard that grows does not change the folder; its writer does when it has finished.
        """
        with self._lock:
            try:
                changed = os.stat(self.folder).st_mtime_ns
            except OSError:
                self._table, self._seen = _Table(), None
                return
            if changed != self._seen or again:
                self._table = self._listed()
                self._seen = changed

    def _listed(self) -> _Table:
        names = sorted(os.listdir(self.folder))
        shards = [self.folder / name for name in names if name.endswith(SHARD)]
        damaged = {_named_damage(name) for name in names if name.endswith(_DAMAGED)}
        table = self._table
        if not set(table.shards) <= set(shards):
            table = _Table()  # entries were deleted
        covered = dict(zip(table.shards, table.covered, strict=True))
        found: dict[Path, Entries] = {}
        for shard in shards:
            with suppress(OSError):  # it was deleted, or cannot be read: its entries are missing
                known = covered.get(shard, 0)
                if known == 0 or os.stat(shard).st_size > known:
                    found[shard] = entries_of(shard, after=known)
        return _merged(table, shards, found, frozenset(damaged))

    @staticmethod
    def _place(table: _Table, row: int) -> Place | None:
        shard, offset = table.shards[table.shard[row]], int(table.offset[row])
        return None if (shard.name, offset) in table.damaged else Place(shard, offset, int(table.length[row]))


@lru_cache(maxsize=64)
def store_of(folder: Path) -> ShardStore:
    """Returns this process's store of a folder, so that the places of its entries are in memory only once."""
    return ShardStore(folder)


def _replaced(table: _Table, *, damaged: frozenset[tuple[str, int]]) -> _Table:
    return _Table(
        table.shards, table.covered, table.first, table.keys, table.shard, table.offset, table.length, damaged
    )


def _merged(
    table: _Table,
    shards: Sequence[Path],
    found: dict[Path, Entries],
    damaged: frozenset[tuple[str, int]],
) -> _Table:
    """Returns a table with the entries of `table` and those that were found since, of the listed shards."""
    numbers = {shard: number for number, shard in enumerate(shards)}
    moved = np.array([numbers[shard] for shard in table.shards], np.uint32)
    known = moved[table.shard] if len(moved) else table.shard
    # The newest first, so that a stable sort keeps it before older entries with its key.
    new = [(numbers[shard], found[shard].rows) for shard in reversed(shards) if shard in found]
    keys = np.concatenate([*(rows["key"] for _, rows in new), table.keys])
    shard = np.concatenate([*(np.full(len(rows), number, np.uint32) for number, rows in new), known])
    offset = np.concatenate([*(rows["offset"] for _, rows in new), table.offset]).astype(np.uint64)
    length = np.concatenate([*(rows["length"] for _, rows in new), table.length]).astype(np.uint32)
    first = np.ascontiguousarray(keys[:, :8]).view("<u8")[:, 0]
    order = np.argsort(first, kind="stable")
    before = dict(zip(table.shards, table.covered, strict=True))
    covered = [found[one].covered if one in found else before.get(one, 0) for one in shards]
    return _Table(
        tuple(shards), covered, first[order], keys[order], shard[order], offset[order], length[order], damaged
    )


def _named_damage(name: str) -> tuple[str, int]:
    shard, _, offset = name.removesuffix(_DAMAGED).rpartition(".")
    return shard, int(offset) if offset.isdecimal() else -1


def shard_files(folder: Path) -> list[Path]:
    """Returns the shards, indexes and notes of damage in a folder."""
    return [file for file in folder.glob("*") if file.suffix in (SHARD, INDEX, _DAMAGED)]
