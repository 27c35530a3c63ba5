"""Tests of reading image folders: every accepted form, and every kind of mistake in them."""

import csv
import hashlib
import io
import json
import zlib
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as PictureFeature
from PIL import Image

from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.contents import load_pixels, sample_bytes
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.errors import DataError

from repository import RECIPES

PHOTOS = RECIPES / "photos"


def picture(path: Path, color: object = (200, 100, 50), size: tuple[int, int] = (24, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def rows(folder: Path, *named: tuple[str, str]) -> None:
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in named]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def complaint(path: Path, prefix: str = "") -> list[str]:
    with pytest.raises(DataError) as caught:
        read_samples(path, CaptionStyle(prefix))
    return str(caught.value).splitlines()


def captions(path: Path, prefix: str = "") -> dict[str, str]:
    return {sample.path.name: sample.caption for sample in read_samples(path, CaptionStyle(prefix))}


class TestForms:
    def test_the_shipped_photos_have_captions_and_licenses(self) -> None:
        samples = read_samples(PHOTOS)
        assert 12 <= len(samples) <= 24
        assert [sample.index for sample in samples] == list(range(len(samples)))
        assert len({sample.caption for sample in samples}) == len(samples)
        assert {"portrait": 1, "landscape": 1, "square": 1}.keys() == {
            "square" if s.width == s.height else "portrait" if s.width < s.height else "landscape"
            for s in samples
        }
        assert sum(file.stat().st_size for file in PHOTOS.iterdir()) < 1.5e6
        licenses = (PHOTOS / "LICENSES.md").read_text(encoding="utf-8")
        assert all(sample.path.name in licenses for sample in samples)

    def test_jsonl(self, tmp_path: Path) -> None:
        file = picture(tmp_path / "a.png", size=(24, 16))
        rows(tmp_path, ("a.png", "  a red box  "))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert read_samples(tmp_path) == [
            Sample(0, file, "a red box", 24, 16, digest, captions=("a red box",))
        ]

    def test_jsonl_with_byte_order_mark_blank_lines_and_line_separators(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.png")
        row = json.dumps({"file_name": "a.png", "caption": "one\u2028two"}, ensure_ascii=False)
        (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf\r\n" + row.encode() + b"\r\n\r\n")
        assert captions(tmp_path) == {"a.png": "one\u2028two"}

    def test_csv_with_quoted_commas_and_line_breaks(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.png")
        with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["file_name", "caption"], ["a.png", "red, green\nand blue"]])
        assert captions(tmp_path) == {"a.png": "red, green\nand blue"}

    def test_text_files_next_to_images_in_nested_folders(self, tmp_path: Path) -> None:
        for name, suffix in (("b.JPG", ".TXT"), ("deep/er/a.webp", ".txt")):
            picture(tmp_path / name)
            (tmp_path / name).with_suffix(suffix).write_text(f"caption of {name}\n", encoding="utf-8")
        assert [sample.caption for sample in read_samples(tmp_path)] == [
            "caption of b.JPG",
            "caption of deep/er/a.webp",
        ]

    def test_a_metadata_file_in_each_folder(self, tmp_path: Path) -> None:
        for name in ("x", "y"):
            picture(tmp_path / name / "a.png")
            rows(tmp_path / name, ("a.png", f"from {name}"))
        picture(tmp_path / "z" / "deep" / "a.png")
        rows(tmp_path / "z", ("deep/a.png", "from z"))
        assert [sample.caption for sample in read_samples(tmp_path)] == ["from x", "from y", "from z"]

    def test_relative_paths_and_paths_through_a_parent_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        picture(tmp_path / "deep" / "a.png")
        rows(tmp_path, ("deep/a.png", "x"))
        (tmp_path / "sibling").mkdir()
        assert captions(tmp_path / "sibling" / "..") == {"a.png": "x"}
        monkeypatch.chdir(tmp_path)
        assert captions(Path()) == {"a.png": "x"}
        assert captions(Path("sibling/..")) == {"a.png": "x"}

    def test_hidden_files_are_left_out(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.png")
        picture(tmp_path / ".trash" / "b.png")
        (tmp_path / "._a.png").write_bytes(b"resource fork")
        assert captions(tmp_path, "word") == {"a.png": "word"}

    @pytest.mark.parametrize("prefix", ["TOK", "TOK "])
    def test_the_prefix_precedes_every_caption_and_replaces_missing_ones(
        self, tmp_path: Path, prefix: str
    ) -> None:
        for name in ("a", "b", "c"):
            picture(tmp_path / f"{name}.png")
        (tmp_path / "a.txt").write_text("a box", encoding="utf-8")
        (tmp_path / "b.txt").write_text("", encoding="utf-8")
        assert captions(tmp_path, prefix) == {"a.png": "TOK a box", "b.png": "TOK", "c.png": "TOK"}

    def test_the_order_does_not_depend_on_the_order_of_rows(self, tmp_path: Path) -> None:
        for name in ("b", "a", "c"):
            picture(tmp_path / f"{name}.png")
        rows(tmp_path, ("c.png", "3"), ("a.png", "1"), ("b.png", "2"))
        assert [sample.caption for sample in read_samples(tmp_path)] == ["1", "2", "3"]

    def test_known_images_are_not_decoded_again_and_progress_is_reported(self, tmp_path: Path) -> None:
        file = picture(tmp_path / "a.png")
        # Truncated after the header: reading succeeds only if the image is not decoded.
        file.write_bytes(file.read_bytes()[:-30])
        seen: list[tuple[int, int]] = []
        with pytest.raises(DataError, match=r"a\.png: .*truncated"):
            read_samples(tmp_path, CaptionStyle("x"), progress=lambda done, total: seen.append((done, total)))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        samples = read_samples(tmp_path, CaptionStyle("x"), is_decoded=lambda sha256: sha256 == digest)
        assert [(sample.width, sample.height) for sample in samples] == [(24, 16)]
        assert seen == [(1, 1)]


class TestParquet:
    @staticmethod
    def encoded(color: object) -> bytes:
        stream = io.BytesIO()
        Image.new("RGB", (20, 10), color).save(stream, "PNG")
        return stream.getvalue()

    def test_parquet_files_written_by_datasets(self, tmp_path: Path) -> None:
        colors = [(10 * n, 0, 0) for n in range(7)]
        images = [{"bytes": self.encoded(color), "path": None} for color in colors]
        features = Features({"image": PictureFeature(decode=False), "text": Value("string")})
        data = Dataset.from_dict({"image": images, "text": [f"row {n}" for n in range(7)]}, features=features)
        data.to_parquet(tmp_path / "train-00000-of-00001.parquet", batch_size=3)
        samples = read_samples(tmp_path)
        assert [sample.caption for sample in samples] == [f"row {n}" for n in range(7)]
        assert [(sample.width, sample.height, sample.row) for sample in samples][2] == (20, 10, 2)
        for sample, color in zip(reversed(samples), reversed(colors), strict=True):
            pixels = load_pixels(sample, (0, 0, 20, 10), (4, 2), False)
            assert torch.allclose(pixels[0], torch.tensor(color[0] / 127.5 - 1))
        assert (
            read_samples(tmp_path / "train-00000-of-00001.parquet", CaptionStyle("p"))[0].caption == "p row 0"
        )

    def test_paths_stay_inside_the_folder(self, tmp_path: Path) -> None:
        root = tmp_path / "data"
        inside = picture(root / "images" / "a.png")
        outside = picture(tmp_path / "secret.png")
        inside.rename(root / "images" / "a")  # without a suffix, it is found only through the table
        paths = ["images/a", "../secret.png", str(outside), "images/none"]
        table = {"image": [{"bytes": None, "path": path} for path in paths], "text": ["w", "x", "y", "z"]}
        pyarrow.parquet.write_table(pyarrow.table(table), root / "a.parquet")
        lines = complaint(root)
        assert len(lines) == 3
        assert "row 1: " in lines[0]
        assert "'../secret.png'" in lines[0]
        assert f"outside {root}" in lines[0]
        assert "row 2: " in lines[1]
        assert f"outside {root}" in lines[1]
        assert "row 3: " in lines[2]
        assert "missing" in lines[2]
        assert "'images/none'" in lines[2]

    def test_bad_rows_and_files(self, tmp_path: Path) -> None:
        table = {"image": [self.encoded("red"), b"junk", None], "caption": [None, "x", "y"]}
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
        pyarrow.parquet.write_table(pyarrow.table({"pixels": [1]}), tmp_path / "b.parquet")
        (tmp_path / "c.parquet").write_bytes(b"PAR1 but not really")
        for start, *fragments in (
            ("a.parquet row 0: ", "empty", "caption"),
            ("a.parquet row 1: ", "decode"),
            ("a.parquet row 2: image: ", "bytes", "path"),
            ("b.parquet: ", "'pixels'", "image and text (or caption)"),
            ("c.parquet: ", "parquet file: "),
        ):
            (line,) = [line for line in complaint(tmp_path) if start in line]
            assert all(fragment in line for fragment in fragments), line


class TestBadFolders:
    def test_no_folder(self, tmp_path: Path) -> None:
        (line,) = complaint(tmp_path / "none")
        assert line.startswith(f"{tmp_path / 'none'}: ")
        assert "no such folder" in line

    def test_empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "notes.md").write_text("nothing", encoding="utf-8")
        (line,) = complaint(tmp_path)
        assert line.startswith(f"{tmp_path}: ")
        assert ".jpg, .jpeg, .png" in line

    def test_a_saved_dataset_without_images(self, tmp_path: Path) -> None:
        Dataset.from_dict({"text": ["a dog"]}).save_to_disk(tmp_path / "saved")
        (line,) = complaint(tmp_path / "saved")
        assert line.startswith(f"{tmp_path / 'saved' / 'data-00000-of-00001.arrow'}: ")
        assert "image_column" in line

    def test_a_row_for_a_missing_image_suggests_a_similar_name(self, tmp_path: Path) -> None:
        picture(tmp_path / "cat.jpg")
        rows(tmp_path, ("cat.jpg", "a cat"), ("dogs/dog.jpg", "a dog"), ("Cat.JPEG", "a cat"))
        lines = complaint(tmp_path)
        where = tmp_path / "metadata.jsonl"
        assert lines[0].startswith(f"{where}:2: ")
        assert lines[0].endswith("'dogs/dog.jpg'")
        assert lines[1].startswith(f"{where}:3: ")
        assert lines[1].endswith("'Cat.JPEG'; did you mean 'cat.jpg'?")

    def test_duplicate_rows(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.png")
        rows(tmp_path, ("a.png", "one"), ("./a.png", "two"))
        (line,) = complaint(tmp_path)
        where = tmp_path / "metadata.jsonl"
        assert line.startswith(f"{where}:2: './a.png' ")
        assert f"{where}:1" in line

    def test_an_image_without_a_caption(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.png")
        (line,) = complaint(tmp_path)
        assert line.startswith(f"{tmp_path / 'a.png'}: ")
        assert "a.txt" in line
        assert "metadata.jsonl or metadata.csv" in line
        assert "data.caption_prefix" in line

    def test_empty_captions(self, tmp_path: Path) -> None:
        for name in ("a.png", "b.png"):
            picture(tmp_path / name)
        rows(tmp_path, ("a.png", "  "))
        (tmp_path / "b.txt").write_text("\n", encoding="utf-8")
        lines = complaint(tmp_path)
        assert [line.partition(": ")[0] for line in lines] == [
            str(tmp_path / name) for name in ("a.png", "b.png")
        ]
        assert ["empty" in line for line in lines] == [True, True]

    def test_two_captions_for_one_image(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.png")
        rows(tmp_path, ("a.png", "one"))
        (tmp_path / "a.txt").write_text("two", encoding="utf-8")
        (line,) = complaint(tmp_path)
        assert line.startswith(f"{tmp_path / 'a.png'}: ")
        assert "a.txt" in line
        assert "metadata" in line
        (tmp_path / "a.txt").write_text("one\n", encoding="utf-8")
        assert captions(tmp_path) == {"a.png": "one"}

    @pytest.mark.parametrize(
        ("line", "fragments"),
        [
            ('{"file_name": "a.png", "text": "x"', ("JSON", "column")),
            ('{"file_name": "a.png", "text": ' + "9" * 5000 + "}", ("JSON", "digits")),
            ('["a.png", "x"]', ('["a.png", "x"]', "object")),
            ('{"file_name": "a.png", "text": "\\ud800"}', ("surrogate",)),
            ('{"file_name": "a.png\\u0000", "text": "x"}', ("missing", r"'a.png\x00'")),
            ('{"file": "a.png", "text": "x"}', ("file_name: got null",)),
            ('{"file_name": "a.png", "label": "x"}', ("'text' or 'caption'", "'label'")),
            ('{"file_name": "a.png", "text": 3}', ("caption is 3", "string")),
            ('{"file_name": "a.png", "text": "x", "caption": "y"}', ("'text' and 'caption'", "keep one")),
            ('{"file_name": "../a.png", "text": "x"}', ("'../a.png'", "outside")),
            ('{"file_name": "/etc/passwd", "text": "x"}', ("'/etc/passwd'", "outside")),
            (
                '{"file_name": "metadata.jsonl", "text": "x"}',
                ("'metadata.jsonl'", "accepted: .jpg, .jpeg, .png"),
            ),
        ],
    )
    def test_jsonl_lines(self, tmp_path: Path, line: str, fragments: tuple[str, ...]) -> None:
        picture(tmp_path / "a.png")
        (tmp_path / "metadata.jsonl").write_text(f"\n{line}\n", encoding="utf-8")
        first = complaint(tmp_path)[0]
        assert first.startswith(f"{tmp_path / 'metadata.jsonl'}:2: ")
        assert all(fragment in first for fragment in fragments), first

    @pytest.mark.parametrize(
        ("text", "line", "fragments"),
        [
            ("a.png,a box\n", 1, ("'a.png', 'a box'", "file_name and text")),
            ("file_name,text\na.png,red, green\n", 2, ("more fields", "quote")),
            ("file_name,text\na.png\n", 2, ("fewer fields",)),
            ("", 1, ("nothing", "file_name and text")),
        ],
    )
    def test_csv_rows(self, tmp_path: Path, text: str, line: int, fragments: tuple[str, ...]) -> None:
        picture(tmp_path / "a.png")
        (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
        first = complaint(tmp_path)[0]
        assert first.startswith(f"{tmp_path / 'metadata.csv'}:{line}: ")
        assert all(fragment in first for fragment in fragments), first

    def test_both_metadata_files(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.png")
        rows(tmp_path, ("a.png", "x"))
        (tmp_path / "metadata.csv").write_text("file_name,text\na.png,y\n", encoding="utf-8")
        (line,) = complaint(tmp_path)
        assert line.startswith(f"{tmp_path / 'metadata.csv'}: ")
        assert "metadata.jsonl is in the same folder" in line

    def test_captions_that_are_not_utf8(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.png")
        (tmp_path / "a.txt").write_bytes("caf\n\xe9".encode("latin-1"))
        (line,) = complaint(tmp_path)
        assert line.startswith(f"{tmp_path / 'a.txt'}:2: ")
        assert "0xe9" in line
        assert "UTF-8" in line

    @pytest.mark.parametrize("damage", ["truncated", "text", "empty", "bomb"])
    def test_corrupt_images(self, tmp_path: Path, damage: str) -> None:
        file = tmp_path / "a.png"
        Image.effect_noise((64, 64), 50).save(file)
        whole = file.read_bytes()
        header = b"IHDR" + (20000).to_bytes(4, "big") * 2 + whole[24:29]
        bomb = whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:]
        contents = {
            "truncated": (whole[: len(whole) // 2], "image file is truncated"),
            "text": (b"<html>not found</html>", "not an image"),
            "empty": (b"", "0 bytes"),
            "bomb": (bomb, "pixels"),
        }
        data, fragment = contents[damage]
        file.write_bytes(data)
        (line,) = complaint(tmp_path, "x")
        assert line.startswith(f"{file}: ")
        assert fragment in line

    def test_unsupported_image_formats_are_reported(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.png")
        (tmp_path / "b.HEIC").write_bytes(b"?")
        (line,) = complaint(tmp_path, "x")
        assert line.startswith(f"{tmp_path / 'b.HEIC'}: ")
        assert "convert it to one of .jpg" in line

    def test_links_to_outside(self, tmp_path: Path) -> None:
        root = tmp_path / "data"
        picture(root / "a.png")
        secret = picture(tmp_path / "elsewhere" / "secret.png")
        (root / "link.png").symlink_to(secret)
        (root / "folder").symlink_to(secret.parent)
        (root / "twin.png").symlink_to(root / "a.png")
        lines = complaint(root, "x")
        (file_line,) = [line for line in lines if line.startswith(f"{root / 'link.png'}: ")]
        assert f"outside {root}" in file_line
        (folder_line,) = [line for line in lines if line.startswith(f"{root / 'folder'}: ")]
        assert "link to a folder" in folder_line
        assert not any("twin.png" in line for line in lines)

    def test_all_problems_are_reported_together_and_long_lists_are_cut(self, tmp_path: Path) -> None:
        for number in range(70):
            (tmp_path / f"{number:02d}.png").write_bytes(b"junk")
        lines = complaint(tmp_path)
        assert len(lines) == 51
        assert "90 more" in lines[-1]

    def test_an_image_that_changes_later(self, tmp_path: Path) -> None:
        file = picture(tmp_path / "a.png")
        (sample,) = read_samples(tmp_path, CaptionStyle("x"))
        picture(file, "blue")
        with pytest.raises(DataError, match=r"a\.png: .*start again"):
            sample_bytes(sample)
        file.unlink()
        with pytest.raises(DataError, match=r"a\.png: .*No such file"):
            sample_bytes(sample)
