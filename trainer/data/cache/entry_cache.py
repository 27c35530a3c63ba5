"""Finds, reads and verifies the entries of one kind: in the shards of its folder, or in the files of older versions."""

import hashlib
import json
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from halfbyte.quant.files.digest import sha256_of
from halfbyte.trainer.data.cache.entry import DamagedEntry, Shapes, packed, read_entry_file, unpacked
from halfbyte.trainer.data.cache.store import SUBJECT_BYTES, ShardStore, store_of
from halfbyte.trainer.errors import DataError

log = logging.getLogger(__name__)

Item = TypeVar("Item")

VERIFIED_BYTES = 4 * 10**9
"""At the start, a process verifies all its entries of a kind if they have at most this many bytes together."""

_SETTLED_SECONDS = 70.0
"""The time after which a network file system shows the files that another machine has made."""


class EntryCache(ABC, Generic[Item]):
    """The entries of one kind, by what they are made from.

    Bytes are verified whenever an entry is read. An entry that is found damaged is noted, and made again at the next
    start.
    """

    kind: ClassVar[str]  # the name of the folder
    shapes: ClassVar[Shapes]
    dtype: ClassVar[torch.dtype]

    def __init__(self, folder: Path) -> None:
        """`folder` is the cache's folder, which all kinds share."""
        self._folder = folder / self.kind
        self._store = self.store(folder)
        self._has_files = _has_entry_files(self._folder)
        self.patience = 0.0
        """Seconds to wait for an entry that is not there yet, because another machine has just written it."""

    @classmethod
    def store(cls, folder: Path) -> ShardStore:
        """Returns the shards of this kind in the cache's folder."""
        return store_of(folder / cls.kind / "shards")

    @property
    def shards(self) -> Path:
        """The folder of the shards."""
        return self._store.folder

    @abstractmethod
    def key(self, item: Item) -> bytes:
        """Returns the key of an item's entry: a digest of everything that it is made from."""

    @abstractmethod
    def file(self, item: Item) -> Path:
        """Returns the path of an item's entry in the layout of older versions: one file for each entry."""

    @abstractmethod
    def name(self, item: Item) -> str:
        """Returns what messages call an item."""

    def check(self, item: Item, tensors: Mapping[str, Tensor]) -> None:
        """Raises DamagedEntry if the tensors are not those of the item."""

    def wait_for_others(self) -> None:
        """Makes reads wait for entries that other machines have written but that this one may not see yet."""
        self.patience = _SETTLED_SECONDS

    def pack(self, item: Item, tensors: Mapping[str, Tensor], maker: str) -> tuple[bytes, bytes]:
        """Returns the key and the bytes of an entry. Raises DataError if a tensor is not finite."""
        return self.key(item), packed(tensors, f"{self.name(item)}: {maker}")

    def tensors(self, item: Item) -> dict[str, Tensor]:
        """Reads the tensors of an item. Raises DataError if its entry is missing or damaged."""
        try:
            try:
                return self._read(item)
            except FileNotFoundError:
                return self._read_when_seen(item)
        except FileNotFoundError as error:
            raise DataError(
                f"{self.name(item)}: not in the cache {self._folder}; start again to encode it"
            ) from error
        except OSError as error:
            raise DataError(
                f"{self.name(item)}: its entry in the cache {self._folder} cannot be read: {error.strerror}; start"
                " again"
            ) from error
        except DamagedEntry as error:
            raise DataError(
                f"{self.name(item)}: its entry in the cache is damaged ({error}); start again to encode it again"
            ) from error

    def missing(self, items: Iterable[Item], on_sound: Callable[[], None] = lambda: None) -> list[Item]:
        """Returns the items that have no intact entry, without duplicates. Logs a warning for damaged entries.

        Verifies the entries if they have at most VERIFIED_BYTES together. Of more, only the places in the shards are
        checked, and the bytes when they are read. Calls `on_sound` for each entry that is there.
        """
        sizes = self._sizes(items)
        verified = is_small(sizes)
        absent = []
        for item, size in sizes:
            if size is None or (verified and not self._is_sound(item)):
                absent.append(item)
            else:
                on_sound()
        return absent

    def _sizes(self, items: Iterable[Item]) -> list[tuple[Item, int | None]]:
        """Returns the different items with the bytes of their entries; None for those that have none."""
        self._store.refresh(again=True)
        sizes: dict[bytes, tuple[Item, int | None]] = {}
        for item in items:
            key = self.key(item)
            if key not in sizes:
                sizes[key] = item, self._size(item, key)
        return list(sizes.values())

    def count(self, items: Iterable[Item]) -> int:
        """Returns how many of the items, without duplicates, have an entry. The entries are not read."""
        return sum(size is not None for _, size in self._sizes(items))

    def _size(self, item: Item, key: bytes) -> int | None:
        """Returns the bytes of an item's entry; None if there is none."""
        places = self._store.find(key)
        if places:
            return places[0].length
        if self._has_files:
            with suppress(OSError):
                return self.file(item).stat().st_size
        return None

    def _is_sound(self, item: Item) -> bool:
        try:
            self._read(item)
        except DamagedEntry as error:
            log.warning("cache entry of %s is damaged (%s) and will be encoded again", self.name(item), error)
            return False
        except OSError as error:
            log.warning(
                "cache entry of %s cannot be read (%s) and will be encoded again",
                self.name(item),
                error.strerror,
            )
            return False
        return True

    def _read(self, item: Item) -> dict[str, Tensor]:
        """Reads the newest intact entry of an item.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
            DamagedEntry: all that there are are damaged.
        """
        key = self.key(item)
        damage: DamagedEntry | None = None
        for place in self._store.find(key):
            try:
                tensors = unpacked(self._store.read(place, key), self.shapes, self.dtype)
                self.check(item, tensors)
            except DamagedEntry as error:
                self._store.note_damage(place)
                damage = damage or DamagedEntry(f"{place}: {error}")
            else:
                return tensors
        if self._has_files:
            with suppress(FileNotFoundError):
                return self._read_file(item)
        raise damage or FileNotFoundError()

    def _read_file(self, item: Item) -> dict[str, Tensor]:
        file = self.file(item)
        try:
            tensors = read_entry_file(file, self.shapes, self.dtype)
            self.check(item, tensors)
        except DamagedEntry as error:
            with suppress(OSError):
                os.replace(file, f"{file}.damaged")  # it counts as missing from now on
            raise DamagedEntry(f"{file}: {error}") from error
        return tensors

    def _read_when_seen(self, item: Item) -> dict[str, Tensor]:
        """Reads an entry that was not found, after looking for new shards, for as long as `patience` says."""
        end = time.monotonic() + self.patience
        while True:
            self._store.refresh(again=True)
            try:
                return self._read(item)
            except FileNotFoundError:
                if time.monotonic() >= end:
                    raise
                time.sleep(1.0)


def is_small(sizes: Iterable[tuple[object, int | None]]) -> bool:
    """Returns True if entries of these sizes are verified at the start."""
    return sum(size or 0 for _, size in sizes) <= VERIFIED_BYTES


def _has_entry_files(folder: Path) -> bool:
    """Returns True if the folder of a kind may hold entries of older versions, which have a file each."""
    try:
        return any(len(name) == 2 for name in os.listdir(folder))
    except OSError:
        return False


def subject_of(*parts: str) -> bytes:
    """Returns the first bytes of the keys of all entries that are made from the same image or caption."""
    return hashlib.sha256(json.dumps(parts).encode()).digest()[:SUBJECT_BYTES]


def key_of(subject: bytes, made_from: list[object]) -> bytes:
    """Returns the key of an entry: its subject, and a digest of everything else that it is made from."""
    return subject + hashlib.sha256(json.dumps(made_from).encode()).digest()[:SUBJECT_BYTES]


def file_digest_of(made_from: list[object]) -> str:
    """Returns the digest in the names of entries of older versions."""
    return sha256_of(json.dumps(made_from))
