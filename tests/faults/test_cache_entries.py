"""Tests of cache entries that change after the start, and of files that killed processes left in the cache."""

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from halfbyte.quant.files import atomic
from halfbyte.trainer.data.batches import TrainingSet
from halfbyte.trainer.data.cache.encodings import LatentCache, TextCache, encode_missing
from halfbyte.trainer.data.cache.entry_cache import EntryCache
from halfbyte.trainer.data.cache.shard import HEADER_BYTES
from halfbyte.trainer.data.cache.store import store_of
from halfbyte.trainer.data.views.buckets import View
from halfbyte.trainer.data.views.order import Entry
from halfbyte.trainer.errors import DataError

from counting_encoders import (
    CountingEncoders,
    captions_of,
    move_to_files,
    place_of,
    replace_entry,
    views_in,
    write_pictures,
)
from kill_points import kill, points
from soak import report, tries


class Filled:
    """A cache with all entries of four images, and a training set over it."""

    def __init__(self, folder: Path) -> None:
        self.views = views_in(write_pictures(folder / "pictures"))
        self.folder = folder / "cache"
        self.latents, self.texts = encode_missing(
            self.folder, CountingEncoders(), self.views, captions_of(self.views)
        )

    def item(self, kind: str, view: View) -> tuple[EntryCache[Any], Any]:
        return (self.latents, view) if kind == "latents" else (self.texts, view.sample.caption)

    def read(self, view: View) -> None:
        """Reads a sample as training does, in a process that has noted no damage."""
        store_of.cache_clear()
        for note in self.folder.rglob("*.damaged"):
            note.unlink()
        training_set = TrainingSet(LatentCache(self.folder, "vae1"), TextCache(self.folder, "text1"))
        training_set[Entry(0, view)]


@pytest.fixture
def filled(tmp_path: Path) -> Filled:
    return Filled(tmp_path)


def names_the_sample(message: str, kind: str, view: View) -> bool:
    return message.startswith(f"{view.sample.path if kind == 'latents' else repr(view.sample.caption)}: ")


@pytest.mark.parametrize("layout", ["shards", "files"])
@pytest.mark.parametrize("kind", ["latents", "texts"])
def test_every_flipped_bit_is_noticed_by_the_next_read(filled: Filled, kind: str, layout: str) -> None:
    view = filled.views[1]
    cache, item = filled.item(kind, view)
    if layout == "files":
        (victim,) = move_to_files(cache, [item])
        first, length = 0, victim.stat().st_size
    else:
        place = place_of(cache, item)
        victim, first, length = place.shard, place.offset, HEADER_BYTES + place.length
    intact = victim.read_bytes()
    places = random.Random(kind)
    silent, messages = [], []
    flips = tries("ENTRY_FLIPS", 60)
    for _ in range(flips):
        offset, bit = first + places.randrange(length), places.randrange(8)
        damaged = bytearray(intact)
        damaged[offset] ^= 1 << bit
        victim.write_bytes(damaged)
        try:
            filled.read(view)
        except DataError as error:
            messages.append(str(error))
        else:
            silent.append((offset, bit))
    report(f"flipped bits of cached {kind}", tried=flips, undetected=len(silent))
    assert silent == []
    assert all(names_the_sample(message, kind, view) for message in messages)
    assert all("start again" in message for message in messages)
    victim.write_bytes(intact)
    filled.read(view)


@pytest.mark.parametrize("kind", ["latents", "texts"])
def test_a_shard_cut_at_any_place_loses_only_what_was_cut(filled: Filled, kind: str) -> None:
    places = {view: place_of(*filled.item(kind, view)) for view in filled.views}
    shard = next(iter(places.values())).shard
    intact = shard.read_bytes()
    for length in range(0, len(intact), 97):
        shard.write_bytes(intact[:length])
        for view, place in places.items():
            if place.offset + HEADER_BYTES + place.length <= length:
                filled.read(view)
            else:
                with pytest.raises(DataError, match="start again"):
                    filled.read(view)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_with_the_sample(filled: Filled, value: float) -> None:
    view = filled.views[2]
    for kind, name in (("latents", "mean"), ("latents", "std"), ("texts", "prompt_embeds")):
        cache, item = filled.item(kind, view)
        tensors = cache.tensors(item)
        tensors[name].flatten()[7] = value
        shutil.rmtree(cache.shards)
        replace_entry(cache, item, tensors)
        with pytest.raises(DataError, match=f"{name} holds NaN or infinity") as caught:
            cache.tensors(item)
        assert names_the_sample(str(caught.value), kind, view)
        # The next start does what the message says.
        encode_missing(filled.folder, CountingEncoders(), filled.views, captions_of(filled.views))
        assert cache.tensors(item)[name].isfinite().all()


def test_tensors_of_another_shape_or_type_are_refused(filled: Filled) -> None:
    view = filled.views[0]
    shape = filled.latents.read(view).mean.shape[1:]
    cases: list[tuple[str, dict[str, Tensor]]] = [
        ("latents", {"mean": torch.zeros(shape).half()}),
        ("latents", {"mean": torch.zeros(shape)[None]}),
        ("latents", {"std": torch.zeros(3, 1, 1)}),
        ("latents", {name: torch.zeros(3, shape[1] + 1, shape[2]) for name in ("mean", "std")}),
        ("latents", {"other": torch.zeros(3)}),
        ("texts", {"prompt_embeds": torch.zeros(8, 4)}),
        ("texts", {"pooled_prompt_embeds": torch.zeros(4, 1).bfloat16()}),
    ]
    for kind, changed in cases:
        cache, item = filled.item(kind, view)
        tensors = cache.tensors(item)
        shutil.rmtree(cache.shards)
        replace_entry(cache, item, tensors | changed)
        with pytest.raises(DataError, match="damaged"):
            cache.tensors(item)
        replace_entry(cache, item, tensors)
        assert cache.tensors(item).keys() == tensors.keys()


def test_entries_of_the_last_version_are_read(tmp_path: Path) -> None:
    """They have the same checksum over the same bytes."""
    path = TextCache(tmp_path, "text1").file("a cat")
    path.parent.mkdir(parents=True)
    tensors = {
        "prompt_embeds": torch.full((2, 3), 1.5).bfloat16(),
        "pooled_prompt_embeds": torch.full((3,), -2.0).bfloat16(),
    }
    save_file(tensors, path, metadata={"crc32": "49b92df4"})
    assert torch.equal(TextCache(tmp_path, "text1").read("a cat").prompt_embeds[0], tensors["prompt_embeds"])
    assert LatentCache(tmp_path, "vae1").missing([]) == []


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Returns a function that makes a file two minutes old, and lets this process clear folders again."""

    def age(file: Path) -> None:
        then = time.time() - 120
        os.utime(file, (then, then))
        monkeypatch.setattr(atomic, "_cleared", set())

    return age


def unfinished(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.partial"))


def test_the_unfinished_file_of_a_dead_process_is_removed(
    tmp_path: Path, later: Callable[[Path], None]
) -> None:
    file = tmp_path / "file"

    def write() -> None:
        atomic.write_file(file, "content")

    found = points(write)
    file.unlink()
    kill(write, next(n for n, what in enumerate(found) if "before replace" in what))
    (left,) = unfinished(tmp_path)
    write()
    assert unfinished(tmp_path) == [left], "a young file may have a writer that has not locked it yet"
    later(left)
    mine = file.with_name(".mine.partial")
    mine.touch()
    later(mine)
    write()
    assert unfinished(tmp_path) == [mine]


def test_the_unfinished_file_of_a_live_process_is_kept(tmp_path: Path, later: Callable[[Path], None]) -> None:
    reached, go_on = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        sync = os.fsync

        def paused(descriptor: int) -> None:
            os.write(reached[1], b"x")
            os.read(go_on[0], 1)
            sync(descriptor)

        os.fsync = paused  # type: ignore[assignment]
        atomic.write_file(tmp_path / "slow", "slow")
        os._exit(0)
    try:
        assert os.read(reached[0], 1) == b"x"
        (live,) = unfinished(tmp_path)
        later(live)
        atomic.write_file(tmp_path / "quick", "quick")
        assert unfinished(tmp_path) == [live]
    finally:
        os.write(go_on[1], b"x")
        assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "slow").read_text() == "slow"
    assert unfinished(tmp_path) == []
