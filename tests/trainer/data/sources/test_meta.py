"""Tests of meta.json, one file with the captions and tags of a folder."""

import json
from pathlib import Path

import pytest
from PIL import Image

from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "dogs").mkdir()
    for name in ("a", "b", "c", "dogs/d"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{name}.png")
    return tmp_path


def write(folder: Path, content: object, name: str = "meta.json") -> None:
    (folder / name).write_text(json.dumps(content))


def captions(folder: Path) -> list[tuple[str, ...]]:
    return [sample.captions for sample in read_samples(folder)]


@pytest.mark.parametrize("name", ["meta.json", "meta_cap.json"])
def test_captions_and_tags(folder: Path, name: str) -> None:
    content = {
        "a.png": {"caption": "a dog", "tags": "park, sunny", "train_resolution": [8, 8]},
        "b": {"caption": ["one", "two"], "tags": "park"},
        str(folder / "c"): {"tags": "only, tags"},
        "dogs/d.png": {"caption": "in a folder"},
        "elsewhere": {"caption": "of no image"},
    }
    write(folder, content, name)
    assert captions(folder) == [
        ("a dog, park, sunny",),
        ("one, park", "two, park"),
        ("only, tags",),
        ("in a folder",),
    ]


def test_a_file_next_to_an_image_must_agree(folder: Path) -> None:
    write(folder, {name: {"caption": name} for name in ("a", "b", "c", "dogs/d")})
    (folder / "a.txt").write_text("a")
    assert captions(folder)[0] == ("a",)
    (folder / "a.txt").write_text("another")
    with pytest.raises(DataError, match=r"a\.png: has different captions in meta\.json and in a\.txt"):
        captions(folder)


def test_it_may_belong_to_an_image_of_its_name(folder: Path) -> None:
    (folder / "a.png").rename(folder / "meta.png")
    write(folder, {"caption": "of meta.png"})
    for name in ("b", "c", "dogs/d"):
        (folder / f"{name}.txt").write_text(name)
    assert ("of meta.png",) in captions(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected an object with a key"),
        ({"a": "text"}, "expected an object with caption or tags"),
        ({"a": {"caption": 3}}, "the caption is 3, expected a string"),
        ({"x": {"caption": "x"}}, "names none of the images, but 'x'"),
    ],
)
def test_mistakes_are_named(folder: Path, content: object, message: str) -> None:
    write(folder, content)
    with pytest.raises(DataError, match=message):
        captions(folder)
