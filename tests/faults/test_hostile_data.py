"""Tests of data folders that block, never end, fill the memory or write to the terminal."""

import csv
import io
import json
import logging
import os
import socket
import unicodedata
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from halfbyte.quant.files.regular import open_regular, read_regular, require_regular
from halfbyte.trainer.data.archives import parquet
from halfbyte.trainer.data.prompts import references_for
from halfbyte.trainer.data.records.problems import Problems
from halfbyte.trainer.data.sources import captions
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.captions import CAPTION_BYTES, read_metadata
from halfbyte.trainer.data.sources.contents import load_pixels
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.data.views.buckets import Cropping, views_of
from halfbyte.trainer.errors import DataError

NAMES = ("a.png", "a.txt", "metadata.jsonl", "metadata.csv", "data.parquet")


def complaint(path: Path, prefix: str = "") -> list[str]:
    with pytest.raises(DataError) as caught:
        read_samples(path, CaptionStyle(prefix))
    assert caught.value.exit_code == 3
    return str(caught.value).splitlines()


def picture(path: Path, caption: str | None = "a caption") -> Path:
    Image.new("RGB", (24, 16), (200, 100, 50)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["named pipe", "socket", "folder"])
def test_what_is_no_file_is_refused_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket has little room
    if name != "a.png" and name != "data.parquet":
        picture(tmp_path / "a.png", None)
    if kind == "named pipe":
        os.mkfifo(name)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(name)
    else:
        Path(name).mkdir()
    lines = complaint(tmp_path)
    if (name, kind) == ("data.parquet", "folder"):  # as Spark writes a table: its files are looked for inside
        assert lines[0].startswith(f"{tmp_path}: no images")
        return
    assert sum(line.startswith(f"{tmp_path / name}: ") and kind in line for line in lines) == 1, lines


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for path, fragment in (
        (tmp_path / "pipe", "a named pipe"),
        (Path("/dev/zero"), "a device"),
        (tmp_path, "a folder"),
        (tmp_path / "missing", "No such file"),
    ):
        for function in (require_regular, open_regular, read_regular):
            with pytest.raises(OSError, match=fragment):
                function(path, 10)
    for name in ("file", "link"):
        assert read_regular(tmp_path / name, 5) == b"12345"
        with pytest.raises(OSError, match="has 5 bytes, expected at most 4"):
            read_regular(tmp_path / name, 4)
    with pytest.raises(OSError, match="expected at most 3"):
        read_regular(Path("/proc/self/status"), 3)  # its size is given as 0


def test_a_pipe_that_takes_a_file_s_place_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"image")
    looked = os.stat

    def replaced(looked_at: Path) -> os.stat_result:
        found = looked(looked_at)
        path.unlink()
        os.mkfifo(path)
        return found

    monkeypatch.setattr(os, "stat", replaced)
    with pytest.raises(OSError, match="a named pipe"):
        open_regular(path, 100)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("a.png", 10**9 + 1),
        ("a.txt", 10**6 + 1),
        ("metadata.jsonl", 2 * 10**9 + 1),
        ("metadata.csv", 2 * 10**9 + 1),
    ],
)
def test_files_that_are_too_large_are_refused_before_they_are_read(
    tmp_path: Path, name: str, size: int
) -> None:
    picture(tmp_path / "a.png", None)
    with (tmp_path / name).open("wb") as file:
        file.truncate(size)  # takes no space on the disk
    lines = complaint(tmp_path, "x")
    assert len(lines) == 1
    assert lines[0].startswith(f"{tmp_path / name}: ")
    assert f"has {size:,} bytes" in lines[0]


def test_captions_that_are_too_long(tmp_path: Path) -> None:
    long = "é" * (CAPTION_BYTES // 2 + 1)
    picture(tmp_path / "a.png", None)
    line = json.dumps({"file_name": "a.png", "text": long})
    (tmp_path / "metadata.jsonl").write_text(line, encoding="utf-8")
    (found,) = [line for line in complaint(tmp_path) if "caption has" in line]
    assert f"{CAPTION_BYTES + 2:,} bytes, expected at most {CAPTION_BYTES:,}" in found
    (tmp_path / "metadata.jsonl").unlink()
    with (tmp_path / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["file_name", "text"], ["a.png", long]])
    assert all(len(line) < 300 for line in complaint(tmp_path))
    (tmp_path / "metadata.csv").unlink()
    table = pyarrow.table({"image": [png()], "text": [long]})
    (tmp_path / "a.png").unlink()
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (found,) = complaint(tmp_path)
    assert f"{CAPTION_BYTES + 2:,} bytes" in found
    assert len(found) < 300


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_line_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(captions, "_LINE_CHARACTERS", 1000)
    picture(tmp_path / "a.png")
    with (tmp_path / name).open("wb") as file:
        file.write(b"file_name,text\n" if name.endswith("csv") else b"\n")
        file.truncate(10**9)
    lines = complaint(tmp_path)
    assert lines[0].startswith(f"{tmp_path / name}:2: ")
    assert "more than 1,000 characters" in lines[0]


@pytest.mark.parametrize("equal", [False, True])
def test_row_groups_that_would_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equal: bool
) -> None:
    """Packed bytes, or one image that a dictionary repeats: both are a small file."""
    monkeypatch.setattr(parquet, "_GROUP_BYTES", 1_000_000)
    image = png() + bytes(100_000)
    images = [image] * 20 if equal else [png() + bytes(2_000_000)]
    table = pyarrow.table({"image": images, "text": ["x"] * len(images)})
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, file, compression="zstd", use_dictionary=equal)
    assert file.stat().st_size < 20_000
    size = pyarrow.parquet.ParquetFile(file).metadata.row_group(0).total_byte_size
    assert (size < 1_000_000) == equal
    (line,) = complaint(tmp_path)
    assert line.startswith(f"{file}: row group 0 ")
    assert "expected at most 1,000,000" in line
    # As the message advises.
    pyarrow.parquet.write_table(table.slice(0, 6), file, row_group_size=3)
    monkeypatch.setattr(parquet, "_GROUP_BYTES", 8_000_000)
    assert len(read_samples(tmp_path)) == len(table.slice(0, 6))


def test_images_of_row_groups_are_read_in_any_order(tmp_path: Path) -> None:
    images = []
    for shade in range(40):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(stream, "PNG")
        images.append(stream.getvalue())
    table = pyarrow.table({"image": images, "text": [str(shade) for shade in range(40)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=18)
    for sample in reversed(read_samples(tmp_path)):
        red = load_pixels(sample, (0, 0, 8, 8), (8, 8), False)[0, 0, 0].item()
        assert round((red + 1) * 127.5) == int(sample.caption)


def test_loops_of_links(tmp_path: Path) -> None:
    for name in NAMES[:4]:
        (tmp_path / name).symlink_to(tmp_path / name)
    lines = complaint(tmp_path)
    for name in ("a.png", "a.txt", "metadata.jsonl"):
        (line,) = [line for line in lines if line.startswith(f"{tmp_path / name}: ")]
        assert "Too many levels of symbolic links" in line
    table = tmp_path / "table" / "data.parquet"
    table.parent.mkdir()
    table.symlink_to(table)
    (line,) = complaint(table.parent)
    assert "Too many levels of symbolic links" in line
    table.unlink()
    (table.parent / "loop").symlink_to(table.parent / "loop")
    pyarrow.parquet.write_table(
        pyarrow.table({"image": [{"bytes": None, "path": "loop"}], "text": ["x"]}), table
    )
    (line,) = complaint(table.parent)
    assert "names a missing image, 'loop'" in line


@pytest.mark.parametrize(
    "name", ["a" * 5000 + ".png", "a/" * 3000 + "a.png", "a.png/" * 3, "\0.png", "//dev/zero"]
)
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}), encoding="utf-8")
    (line,) = complaint(tmp_path)
    assert line.startswith(f"{tmp_path / 'metadata.jsonl'}:1: names ")
    table = pyarrow.table({"image": [{"bytes": None, "path": name}], "text": ["x"]})
    (tmp_path / "table").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "table" / "data.parquet")
    (line,) = complaint(tmp_path / "table")
    assert line.startswith(f"{tmp_path / 'table' / 'data.parquet'} row 0: ")


EVIL = "\x1b]0;owned\x07\x9b31m\u202e\n\r"


def test_no_control_character_reaches_a_message(tmp_path: Path) -> None:
    root = tmp_path / f"data{EVIL}"
    root.mkdir()
    (root / f"junk{EVIL}.png").write_bytes(b"junk")
    picture(root / f"none{EVIL}.png", None)
    picture(root / "half.png", None)
    rows = [
        {"file_name": f"missing{EVIL}.png", "text": "x"},
        {"file_name": "half.png", "text": EVIL + "\ud800"},
    ]
    rows += [{"file_name": 3, f"key{EVIL}": 1}, {"file_name": "half.png", f"key{EVIL}": EVIL}]
    (root / "metadata.jsonl").write_text(
        "\n".join([*map(json.dumps, rows), f'["{EVIL[:5]}"]']), encoding="utf-8"
    )
    lines = complaint(root)
    assert len(lines) >= 7
    assert all(line.isprintable() for line in lines), lines
    assert any(r"junk\x1b]0;owned\x07\x9b31m\u202e\n\r.png: " in line for line in lines)


def test_no_control_character_reaches_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / f"a{EVIL}.png", f"cap\x1b[31m{EVIL}tion")
    (tmp_path / f"unused{EVIL}.txt").write_text("x")
    samples = read_samples(tmp_path)
    views_of(samples, [Cropping(512, 16)], seed=0)
    assert len(caplog.messages) == 2
    assert all(message.isprintable() for message in caplog.messages)
    assert caplog.records[0].levelno == logging.WARNING
    with pytest.raises(DataError) as caught:
        references_for(["another prompt"], samples, tmp_path)
    assert str(caught.value).isprintable()
    samples[0].path.unlink()
    with pytest.raises(DataError) as caught:
        load_pixels(samples[0], (0, 0, 8, 8), (8, 8), False)
    assert str(caught.value).isprintable()


FIELD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.text())
)
ROW = st.dictionaries(st.sampled_from(["file_name", "text", "caption", "\x1b"]), FIELD)
CONTENT = st.one_of(
    st.binary(max_size=200),
    st.lists(ROW, max_size=5).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    st.lists(st.text(max_size=30), max_size=5).map(
        lambda rows: "\n".join(["file_name,text", *rows]).encode(errors="replace")
    ),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONTENT, st.sampled_from(["metadata.jsonl", "metadata.csv"]))
def test_any_metadata_gives_rows_or_problems(tmp_path: Path, content: bytes, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    problems = Problems()
    for row in read_metadata(file, problems):
        assert row.file_name.strip()
        for text in row.texts:
            assert text.strip() == text
            text.encode()
    assert all(line.startswith(f"{file}:") for line in problems.lines)
    obeyed = {unicodedata.category(one) for line in problems.lines for one in line} & {"Cc", "Cs", "Zl", "Zp"}
    assert not obeyed, problems.lines
