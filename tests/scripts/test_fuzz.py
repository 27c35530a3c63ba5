"""Tests that each reader accepts or refuses every input that the fuzzer has kept, and changes of these."""

import random
import shutil
from pathlib import Path

import pytest

from halfbyte.trainer.errors import RecipeError
from scripts.fuzz.readers import CORPUS, READERS, Leak, Reader, inputs

CHANGES = 40  # changed inputs per reader


def changed(content: bytes, others: list[bytes], draws: random.Random) -> bytes:
    """Flips bits, cuts a part out, or puts a part of another input in."""
    start, stop = sorted(draws.randrange(len(content) + 1) for _ in range(2))
    kind = draws.randrange(3)
    if kind == 0 and content:
        flipped = bytearray(content)
        for _ in range(draws.randint(1, 4)):
            flipped[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
        return bytes(flipped)
    part = draws.choice(others) if kind == 1 else b""
    return content[:start] + part + content[stop:]


@pytest.mark.parametrize("name", READERS)
def test_every_input_is_accepted_or_refused_with_a_message(name: str, tmp_path: Path) -> None:
    reader, known, draws = READERS[name], inputs(name), random.Random(name)
    more = [changed(draws.choice(known), known, draws) for _ in range(CHANGES)]
    accepted = 0
    for content in [*known, *more]:
        folder = tmp_path / "input"
        folder.mkdir()
        accepted += reader.check(content, folder)
        shutil.rmtree(folder)
    assert 0 < accepted < len(known) + len(more)


def test_the_corpus_is_that_of_the_readers() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} <= set(READERS)


def test_a_message_with_control_characters_is_a_leak(tmp_path: Path) -> None:
    def read(content: bytes, folder: Path) -> None:
        raise RecipeError(content.decode())

    reader = Reader(read, ())
    assert not reader.check(b"one line\nand another", tmp_path)
    for text in ("\x1b[31m", "\u202e", "a" * 100_000):
        with pytest.raises(Leak):
            reader.check(text.encode(), tmp_path)
