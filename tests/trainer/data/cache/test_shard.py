"""Tests of shards: what a killed writer leaves, what a reader finds, and how several are joined."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from halfbyte.trainer.data.cache import shard as shards
from halfbyte.trainer.data.cache.shard import HEADER_BYTES, ShardWriter, entries_of
from halfbyte.trainer.data.cache.store import SUBJECT_BYTES, ShardStore, store_of
from halfbyte.trainer.errors import DiskError


def key(number: int) -> bytes:
    return number.to_bytes(8, "little") * 4


def payload(number: int) -> bytes:
    return bytes([number]) * (100 + number)


def write(folder: Path, numbers: Iterator[int] | range, **options: int) -> None:
    with ShardWriter(folder, **options) as writer:
        for number in numbers:
            writer.add(key(number), payload(number))


def found_in(folder: Path) -> list[int]:
    """Returns the numbers below 50 whose entries are found and intact."""
    store = ShardStore(folder)
    store.refresh()
    return [
        number
        for number in range(50)
        for place in store.find(key(number))[:1]
        if store.read(place, key(number)) == payload(number)
    ]


def test_shards_have_a_size_and_an_index(tmp_path: Path) -> None:
    write(tmp_path, range(20), shard_bytes=500)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2 * len(list(tmp_path.glob("*.shard"))) > 10
    assert found_in(tmp_path) == list(range(20))
    assert store_of(tmp_path) is store_of(tmp_path)


def test_an_index_can_be_made_again(tmp_path: Path) -> None:
    write(tmp_path, range(5))
    (index,) = tmp_path.glob("*.index")
    intact = index.read_bytes()
    for damaged in (b"", intact[:-7], intact[:30] + b"\xff" + intact[31:]):
        index.write_bytes(damaged)
        assert found_in(tmp_path) == list(range(5))
    index.unlink()
    (file,) = tmp_path.glob("*.shard")
    assert found_in(tmp_path) == list(range(5))
    assert not index.exists(), "its writer may still be alive"
    os.utime(file, (time.time() - 120,) * 2)
    assert found_in(tmp_path) == list(range(5))
    assert index.read_bytes() == intact


@pytest.mark.parametrize("killed_at", [0, 1, 30, HEADER_BYTES, HEADER_BYTES + 50])
def test_a_killed_writer_loses_only_the_entry_that_it_was_writing(tmp_path: Path, killed_at: int) -> None:
    """A process is killed with SIGKILL after some bytes of its fourth entry, without a flush or a close."""
    child = os.fork()
    if child == 0:
        writer = ShardWriter(tmp_path)
        for number in range(3):
            writer.add(key(number), payload(number))
        assert writer._file is not None
        os.write(writer._file, (shards._header(key(3), payload(3)) + payload(3))[:killed_at])
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert list(tmp_path.glob("*.index")) == []
    assert found_in(tmp_path) == [0, 1, 2]
    write(tmp_path, range(3, 6))
    assert found_in(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_a_scan_goes_on_after_damage(tmp_path: Path) -> None:
    write(tmp_path, range(6))
    (file,), (index,) = tmp_path.glob("*.shard"), tmp_path.glob("*.index")
    intact = file.read_bytes()
    index.unlink()
    second = HEADER_BYTES + len(payload(0))
    for offset in (second + 3, second + 10, second + 44, second + HEADER_BYTES + 5):
        damaged = bytearray(intact)
        damaged[offset] ^= 16
        file.write_bytes(damaged)
        assert found_in(tmp_path) == [0, 2, 3, 4, 5], offset


def test_a_store_finds_what_is_written_later(tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "shards")
    store.refresh()
    assert store.find(key(1)) == []
    with ShardWriter(store.folder) as writer:
        writer.add(key(1), payload(1))
        store.refresh(again=True)
        assert len(store.find(key(1))) == 1
        writer.add(key(2), payload(2))
        store.refresh(again=True)
        writer.add(key(3), payload(3))
    write(store.folder, range(4, 6))
    store.refresh()
    assert [len(store.find(key(number))) for number in range(1, 7)] == [1, 1, 1, 1, 1, 0]
    assert len(store) == 5
    assert store.has_subject(key(5)[:SUBJECT_BYTES])
    assert not store.has_subject(key(6)[:SUBJECT_BYTES])
    for file in store.folder.iterdir():
        file.unlink()
    store.refresh()
    assert len(store) == 0


def test_the_newest_of_equal_entries_comes_first_and_damage_is_remembered(tmp_path: Path) -> None:
    for _ in range(3):
        write(tmp_path, range(4))
    store = ShardStore(tmp_path)
    store.refresh()
    places = store.find(key(2))
    assert [place.shard for place in places] == sorted((p.shard for p in places), reverse=True)
    store.note_damage(places[0])
    for one in (store, ShardStore(tmp_path)):
        one.refresh()
        assert one.find(key(2)) == places[1:]
        assert len(one.find(key(1))) == 3


def test_a_full_disk_leaves_whole_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes, left = os.write, [3 * HEADER_BYTES + 250]

    def limited(file: int, data: bytes) -> int:
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        written = write_bytes(file, data[: left[0]])
        left[0] -= written
        return written

    monkeypatch.setattr(os, "write", limited)
    with pytest.raises(DiskError, match=r"No space left on device; .*data\.cache_dir"):
        write(tmp_path, range(9))
    monkeypatch.undo()
    (file,) = tmp_path.glob("*.shard")
    assert file.stat().st_size == 2 * HEADER_BYTES + len(payload(0)) + len(payload(1))
    assert found_in(tmp_path) == [0, 1]


def test_entries_are_flushed_before_the_index_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[int, bool]] = []
    fsync = os.fsync

    def noted(file: int) -> None:
        flushed.append((os.fstat(file).st_size, any(tmp_path.glob("*.index"))))
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    write(tmp_path, range(2))
    (file,) = tmp_path.glob("*.shard")
    assert (file.stat().st_size, False) in flushed


def test_many_entries_take_little_memory(tmp_path: Path) -> None:
    count = 2 * 10**5
    (tmp_path / "a.shard").touch()
    os.truncate(tmp_path / "a.shard", count * 100)
    rows = np.zeros(count, shards._ROW)
    rows["key"] = np.random.default_rng(0).integers(0, 256, (count, 32), dtype=np.uint8)
    rows["offset"] = np.arange(count) * 100
    rows["length"] = 100 - HEADER_BYTES
    shards.write_index(tmp_path / "a.shard", shards.Entries(rows, count * 100))
    assert len(entries_of(tmp_path / "a.shard").rows) == count
    store = ShardStore(tmp_path)
    store.refresh()
    table = store._table
    arrays = (table.first, table.keys, table.shard, table.offset, table.length)
    assert sum(array.nbytes for array in arrays) / count <= 56
    for number in (0, 1, 77_777, count - 1):
        (place,) = store.find(rows["key"][number].tobytes())
        assert (place.offset, place.length) == (100 * number, 100 - HEADER_BYTES)
    assert store.find(bytes(32)) == []
