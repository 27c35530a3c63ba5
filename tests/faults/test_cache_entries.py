"""Tests of cache entries that change after the start, and of files that killed processes left in the cache."""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte.quant.files import atomic
from halfbyte.trainer.data.batches import TrainingSet
from halfbyte.trainer.data.cache.encodings import LatentCache, TextCache, encode_missing
from halfbyte.trainer.data.cache.entry import checksum, write_entry
from halfbyte.trainer.data.views.buckets import View
from halfbyte.trainer.data.views.order import Entry
from halfbyte.trainer.errors import DataError

from counting_encoders import CountingEncoders, captions_of, views_in, write_pictures
from kill_points import kill, points
from soak import report, tries


class Filled:
    """A cache with all entries of four images, and a training set over it."""

    def __init__(self, folder: Path) -> None:
        self.views = views_in(write_pictures(folder / "pictures"))
        self.cache = folder / "cache"
        self.latents, self.texts = encode_missing(
            self.cache, CountingEncoders(), self.views, captions_of(self.views)
        )
        self.training_set = TrainingSet(self.latents, self.texts)

    def entry(self, kind: str, view: View) -> Path:
        return self.latents.path(view) if kind == "latents" else self.texts.path(view.sample.caption)


@pytest.fixture
def filled(tmp_path: Path) -> Filled:
    return Filled(tmp_path)


def names_the_sample(message: str, kind: str, view: View) -> bool:
    return message.startswith(f"{view.sample.path if kind == 'latents' else repr(view.sample.caption)}: ")


@pytest.mark.parametrize("kind", ["latents", "texts"])
def test_every_flipped_bit_is_noticed_by_the_next_read(filled: Filled, kind: str) -> None:
    view = filled.views[1]
    victim = filled.entry(kind, view)
    intact = victim.read_bytes()
    places = random.Random(kind)
    silent, messages = [], []
    flips = tries("ENTRY_FLIPS", 120)
    for _ in range(flips):
        place, bit = places.randrange(len(intact)), places.randrange(8)
        damaged = bytearray(intact)
        damaged[place] ^= 1 << bit
        victim.write_bytes(damaged)
        try:
            filled.training_set[Entry(0, view)]
        except DataError as error:
            messages.append(str(error))
        else:
            silent.append((place, bit))
    report(f"flipped bits of cached {kind}", tried=flips, undetected=len(silent))
    assert silent == []
    assert all(names_the_sample(message, kind, view) for message in messages)
    assert all("start again" in message for message in messages)
    victim.write_bytes(intact)
    filled.training_set[Entry(0, view)]


@pytest.mark.parametrize("kind", ["latents", "texts"])
def test_a_file_cut_at_any_place_is_refused(filled: Filled, kind: str) -> None:
    view = filled.views[0]
    victim = filled.entry(kind, view)
    intact = victim.read_bytes()
    for length in range(0, len(intact), 13):
        victim.write_bytes(intact[:length])
        with pytest.raises(DataError, match="start again"):
            filled.training_set[Entry(0, view)]


def replaced(path: Path, **changed: Tensor) -> None:
    """Writes other tensors with their correct checksum, as another program or an older version might."""
    tensors = load_file(path) | changed
    save_file(tensors, path, metadata={"crc32": checksum(tensors)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_with_the_sample(filled: Filled, value: float) -> None:
    view = filled.views[2]
    for kind, name in (("latents", "mean"), ("latents", "std"), ("texts", "prompt_embeds")):
        path = filled.entry(kind, view)
        intact = path.read_bytes()
        tensor = load_file(path)[name]
        tensor.flatten()[7] = value
        replaced(path, **{name: tensor})
        with pytest.raises(DataError, match=f"{name} holds NaN or infinity") as caught:
            filled.training_set[Entry(0, view)]
        assert names_the_sample(str(caught.value), kind, view)
        # The next start does what the message says.
        encoders = CountingEncoders()
        encode_missing(filled.cache, encoders, filled.views, captions_of(filled.views))
        assert len(encoders.pictures) + len(encoders.captions) == 1
        assert path.read_bytes() == intact


def test_tensors_of_another_shape_or_type_are_refused(filled: Filled) -> None:
    view = filled.views[0]
    latents, text = filled.entry("latents", view), filled.entry("texts", view)
    shape = load_file(latents)["mean"].shape
    cases: list[tuple[Path, dict[str, Tensor]]] = [
        (latents, {"mean": torch.zeros(shape).half()}),
        (latents, {"mean": torch.zeros(shape)[None]}),
        (latents, {"std": torch.zeros(3, 1, 1)}),
        (latents, {name: torch.zeros(3, shape[1] + 1, shape[2]) for name in ("mean", "std")}),
        (latents, {"other": torch.zeros(3)}),
        (text, {"prompt_embeds": torch.zeros(8, 4)}),
        (text, {"pooled_prompt_embeds": torch.zeros(4, 1).bfloat16()}),
    ]
    for path, tensors in cases:
        intact = path.read_bytes()
        replaced(path, **tensors)
        with pytest.raises(DataError, match="delete it and start again"):
            filled.training_set[Entry(0, view)]
        path.write_bytes(intact)


def test_entries_of_the_last_version_are_read(tmp_path: Path) -> None:
    """They have the same checksum over the same bytes."""
    cache = TextCache(tmp_path, "text1")
    path = cache.path("a cat")
    path.parent.mkdir(parents=True)
    tensors = {
        "prompt_embeds": torch.full((2, 3), 1.5).bfloat16(),
        "pooled_prompt_embeds": torch.full((3,), -2.0).bfloat16(),
    }
    save_file(tensors, path, metadata={"crc32": "49b92df4"})
    assert torch.equal(cache.read("a cat").prompt_embeds[0], tensors["prompt_embeds"])
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
    entry = tmp_path / "texts" / "ab" / "cd.safetensors"
    entry.parent.mkdir(parents=True)
    tensors = {"prompt_embeds": torch.ones(2, 3)}
    found = points(lambda: write_entry(entry, tensors, "T5"))
    entry.unlink()
    kill(
        lambda: write_entry(entry, tensors, "T5"),
        next(n for n, what in enumerate(found) if "before replace" in what),
    )
    (left,) = unfinished(tmp_path)
    write_entry(entry, tensors, "T5")
    assert unfinished(tmp_path) == [left], "a young file may have a writer that has not locked it yet"
    later(left)
    mine = entry.with_name(".mine.partial")
    mine.touch()
    later(mine)
    write_entry(entry, tensors, "T5")
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
