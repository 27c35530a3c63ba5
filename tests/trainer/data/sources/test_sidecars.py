"""Tests of captions in files next to images, and of several captions for one image."""

import json
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
from PIL import Image

from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.errors import DataError


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 16), "red").save(path)
    return path


def captions(path: Path, style: CaptionStyle = CaptionStyle()) -> dict[str, tuple[str, ...]]:  # noqa: B008
    return {sample.path.name: sample.captions for sample in read_samples(path, style)}


def complaint(path: Path, style: CaptionStyle = CaptionStyle()) -> str:  # noqa: B008
    with pytest.raises(DataError) as caught:
        read_samples(path, style)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize(
    "name", ["a.txt", "a.TXT", "a.caption", "a.jpg.txt", "a.jpg.caption", "a.json", "a.jpg.json"]
)
def test_a_caption_file_is_found_under_each_name(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "a.jpg")
    text = json.dumps({"caption": "a red card\n"}) if name.endswith("json") else "\ufeffa red card\r\n"
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert captions(tmp_path) == {"a.jpg": ("a red card",)}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"text": "one"}, ("one",)),
        ({"caption": ["one", " two "], "width": 24}, ("one", "two")),
        (["one", "two"], ("one", "two")),
        ("one", ("one",)),
        ({"caption": "one", "text": "one"}, ("one",)),
    ],
)
def test_json_has_a_caption_or_a_list(tmp_path: Path, content: object, found: tuple[str, ...]) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps(content), encoding="utf-8")
    assert captions(tmp_path) == {"a.png": found}


def test_json_about_other_things_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a card")
    (tmp_path / "a.json").write_text('{"license": "CC0"}')
    assert captions(tmp_path) == {"a.png": ("a card",)}
    (message,) = caplog.messages
    assert str(tmp_path / "a.json") in message
    assert "license" in message


def test_lines_are_captions_only_if_the_recipe_says_so(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\n  two\nthree \n")
    assert captions(tmp_path) == {"a.png": ("one\r\n\r\n  two\nthree",)}
    assert captions(tmp_path, CaptionStyle(lines=True)) == {"a.png": ("one", "two", "three")}
    (sample,) = read_samples(tmp_path, CaptionStyle("a photo of", lines=True))
    assert sample.caption == "a photo of one"


def test_a_table_may_have_lists(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    row = {"file_name": "a.png", "text": ["one", "two"]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert captions(tmp_path) == {"a.png": ("one", "two")}
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "table").mkdir()
    table = pyarrow.table({"image": [data, data], "caption": [["one", "two"], ["three"]]})
    pyarrow.parquet.write_table(table, tmp_path / "table" / "a.parquet")
    found = [sample.captions for sample in read_samples(tmp_path / "table")]
    assert found == [("one", "two"), ("three",)]


@pytest.mark.parametrize(
    ("one", "other"), [("a.txt", "a.caption"), ("a.txt", "a.png.txt"), ("a.caption", "a.json")]
)
def test_two_files_must_agree(tmp_path: Path, one: str, other: str) -> None:
    picture(tmp_path / "a.png")
    for name, text in ((one, "a card"), (other, "a box")):
        (tmp_path / name).write_text(json.dumps(text) if name.endswith("json") else text)
    line = complaint(tmp_path)
    assert line.startswith(f"{tmp_path / 'a.png'}: ")
    assert one in line
    assert other in line
    (tmp_path / other).write_text('"a card"' if other.endswith("json") else " a card\n")
    assert captions(tmp_path) == {"a.png": ("a card",)}


def test_a_file_and_a_table_must_agree_on_all_captions(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": ["one", "two"]}))
    (tmp_path / "a.txt").write_text("one\nthree")
    line = complaint(tmp_path, CaptionStyle(lines=True))
    assert "metadata.jsonl" in line
    assert "a.txt" in line


def test_caption_files_without_an_image_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "a.png")
    for name in ("a.txt", "b.txt", "c.caption", "d.json"):
        (tmp_path / name).write_text('"x"')
    captions(tmp_path)
    (message,) = caplog.messages
    assert message.startswith("2 caption files")
    assert "b.txt" in message


def test_images_with_the_settings_only_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name)
    read_samples(tmp_path, CaptionStyle(trigger_word="sks"))
    assert not caplog.messages  # all alike
    (tmp_path / "a.txt").write_text("a card")
    (tmp_path / "b.txt").write_text("")
    read_samples(tmp_path, CaptionStyle(trigger_word="sks"))
    (message,) = caplog.messages
    assert message.startswith("2 of 3 images")
    assert "'sks'" in message
    assert str(tmp_path / "b.png") in message


def test_repeats_in_the_names_of_folders_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in ("10_sks dog", "1_dog"):
        picture(tmp_path / "img" / folder / "a.png")
    read_samples(tmp_path, CaptionStyle("x"))
    (message,) = caplog.messages
    assert str(tmp_path / "img" / "10_sks dog") in message
    assert "data.sets" in message
    caplog.clear()
    read_samples(tmp_path / "img" / "10_sks dog", CaptionStyle("x"))  # as a set with repeats
    assert not caplog.messages
