"""Tests of captions that cannot be used: each is reported with its file and the reason, in one line."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
from PIL import Image

from halfbyte.trainer.data.prompts import refuse_placeholders
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.errors import DataError, RecipeError

STYLE = CaptionStyle()
LINES = CaptionStyle(lines=True)
TEXT_FILES = ["a.txt", "a.caption", "a.png.txt"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (24, 16), "red").save(tmp_path / "a.png")
    return tmp_path


def complaint(path: Path, style: CaptionStyle = STYLE) -> str:
    with pytest.raises(DataError) as caught:
        read_samples(path, style)
    assert caught.value.exit_code == 3
    (line,) = str(caught.value).splitlines()
    assert line.isprintable()
    return line


@pytest.mark.parametrize("name", [*TEXT_FILES, "a.json"])
@pytest.mark.parametrize(
    ("encode", "words"),
    [
        (lambda text: text.encode("latin-1"), ":1: not UTF-8 (byte 0xe9)"),
        (lambda text: text.encode("utf-16"), ":1: not UTF-8 (byte 0xff)"),
        (lambda text: text.encode("utf-16-be").replace("é".encode("utf-16-be"), b"\0e"), "NUL characters"),
    ],
)
def test_other_encodings(folder: Path, name: str, encode: Callable[[str], bytes], words: str) -> None:
    (folder / name).write_bytes(encode(json.dumps("a café", ensure_ascii=False)))
    line = complaint(folder)
    assert line.startswith(str(folder / name))
    assert words in line
    assert "save it as UTF-8" in line


@pytest.mark.parametrize("name", [*TEXT_FILES, "a.json"])
def test_a_named_pipe_does_not_block(folder: Path, name: str) -> None:
    os.mkfifo(folder / name)
    line = complaint(folder)
    assert line.startswith(f"{folder / name}: ")
    assert "named pipe" in line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, " \r\n\t\n") for name in TEXT_FILES),
        *(("a.json", text) for text in ('""', "[]", "null", '{"text": null}')),
    ],
)
@pytest.mark.parametrize("style", [STYLE, LINES])
def test_empty_captions(folder: Path, name: str, content: str, style: CaptionStyle) -> None:
    (folder / name).write_text(content)
    line = complaint(folder, style)
    assert line.startswith(f"{folder / 'a.png'}: ")
    assert "empty caption" in line
    (sample,) = read_samples(folder, CaptionStyle(suffix="a card", lines=style.lines))
    assert (sample.caption, sample.captions) == ("a card", ())


LISTS = [
    (["one", 2], "caption 2 of 2 is 2, expected a string"),
    ([None], "caption 1 of 1 is null"),
    ([["one"]], 'caption 1 of 1 is ["one"]'),
    (["one", " "], "caption 2 of 2 is empty"),
    ({"de": "eins"}, "the caption is {"),
    (7, "the caption is 7"),
    (["x"] * 1001, "1,001 captions, expected at most 1,000"),
    (["one", "x" * (10**6 + 1)], "1,000,001 bytes"),
    (["\ud800"], "half of a character"),
]


@pytest.mark.parametrize(("value", "words"), LISTS)
def test_lists_of_other_things_in_a_table(folder: Path, value: object, words: str) -> None:
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": value}))
    with pytest.raises(DataError) as caught:
        read_samples(folder)
    first = str(caught.value).splitlines()[0]
    assert first.startswith(f"{folder / 'metadata.jsonl'}:1: ")
    assert words in first


@pytest.mark.parametrize(("value", "words"), [one for one in LISTS if "bytes" not in one[1]])
def test_lists_of_other_things_in_json(folder: Path, value: object, words: str) -> None:
    (folder / "a.json").write_text(json.dumps({"caption": value}))
    line = complaint(folder)
    assert line.startswith(f"{folder / 'a.json'}: ")
    assert words in line


def test_lists_of_other_things_in_parquet(folder: Path) -> None:
    data = (folder / "a.png").read_bytes()
    (folder / "table").mkdir()
    for values, words in (
        ([["one", None]], "caption 2 of 2 is null"),
        ([[1, 2]], "caption 1 of 2 is 1"),
        ([1], "is 1"),
    ):
        pyarrow.parquet.write_table(
            pyarrow.table({"image": [data], "text": values}), folder / "table" / "a.parquet"
        )
        with pytest.raises(DataError) as caught:
            read_samples(folder / "table")
        first = str(caught.value).splitlines()[0]
        assert first.startswith(f"{folder / 'table' / 'a.parquet'} row 0: ")
        assert words in first


@pytest.mark.parametrize("name", ["a.txt", "a.caption"])
def test_too_many_lines(folder: Path, name: str) -> None:
    (folder / name).write_text("x\n" * 1001)
    assert len(read_samples(folder)) == 1
    line = complaint(folder, LINES)
    assert line.startswith(f"{folder / name}: has 1,001 captions")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{\n"caption": "one', ":2: not valid JSON"),
        ("", ":1: not valid JSON"),
        ("[" * 100_000, "not usable JSON"),
        ("1" * 5000, "not usable JSON"),
        ('{"caption": "one", "text": "two"}', "different values"),
    ],
)
def test_json_that_cannot_be_used(folder: Path, content: str, words: str) -> None:
    (folder / "a.json").write_text(content)
    line = complaint(folder)
    assert line.startswith(str(folder / "a.json"))
    assert words in line


def test_a_placeholder_without_a_trigger_word_names_the_file(folder: Path) -> None:
    style = CaptionStyle("a photo", setting="data.sets[1]")
    for name, content, where in (
        ("a.txt", "a [trigger] dog", folder / "a.txt"),
        ("a.json", '["a dog", "a [trigger] dog"]', folder / "a.json"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "[trigger]"}', f"{folder / 'metadata.jsonl'}:1"),
    ):
        (folder / name).write_text(content)
        line = complaint(folder, style)
        assert line.startswith(f"{where}: contains [trigger]")
        assert "data.sets[1].trigger_word" in line
        (folder / name).unlink()
    for style in (CaptionStyle("[trigger],"), CaptionStyle(suffix="by [trigger]")):
        assert complaint(folder, style).startswith("data.caption_")


def test_a_placeholder_in_a_parquet_file_names_the_row(folder: Path) -> None:
    data = (folder / "a.png").read_bytes()
    (folder / "table").mkdir()
    table = pyarrow.table({"image": [data, data], "text": ["a dog", "a [trigger] dog"]})
    pyarrow.parquet.write_table(table, folder / "table" / "a.parquet")
    assert complaint(folder / "table").startswith(
        f"{folder / 'table' / 'a.parquet'} row 1: contains [trigger]"
    )


def test_a_placeholder_in_a_prompt_is_refused() -> None:
    refuse_placeholders(["a dog"])
    with pytest.raises(RecipeError, match=r"^sample\.prompts\[1\]: "):
        refuse_placeholders(["a dog", "a [trigger] dog"])
