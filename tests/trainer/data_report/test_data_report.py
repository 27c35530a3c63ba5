"""Tests of `halfbyte data`: what it finds, the page it writes, and that nothing in the data becomes markup."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from halfbyte.trainer.cli.app import app
from halfbyte.trainer.data_report.check import DataReport, check_data
from halfbyte.trainer.data_report.duplicates import fingerprint, near_images
from halfbyte.trainer.data_report.page import data_page, report_lines
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.recipe.load import load_recipe

QUIET = Console(quiet=True)
LONG = "word " * 60


def noise(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Returns smooth random colors, of which each seed gives others."""
    values = numpy.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=numpy.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def recipe(tmp_path: Path, mini_flux: Path) -> Path:
    """Two sets: four images of which two are equal and one is similar to these; and one with a mask."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    for name, seed in (("a", 1), ("copy", 1), ("other", 2)):
        noise(seed).save(first / f"{name}.png")
        (first / f"{name}.txt").write_text(f"caption of {name}")
    noise(1).save(first / "similar.jpg", quality=60)
    (first / "similar.txt").write_text(LONG)
    noise(3).save(second / "masked.png")
    (second / "masked.txt").write_text("<b>bold</b> & [trigger], one, two, three")
    mask = Image.new("L", (96, 64), 255)
    mask.paste(0, (48, 0, 96, 64))
    mask.save(second / "masked.mask.png")
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {{family: flux, path: {mini_flux}, max_sequence_length: 24}}\n"
        "data:\n  resolution: [32, 64]\n  sets:\n    - {path: ./first, repeats: 2}\n"
        "    - {path: ./second, masked_loss: {source: files}, trigger_word: ohwx, shuffle_tags: true}\n"
        "output: {dir: out}\n"
    )
    return file


@pytest.fixture
def report(recipe: Path) -> DataReport:
    return check_data(load_recipe(recipe), QUIET, most=100)


def test_copies_and_similar_images_are_found(report: DataReport) -> None:
    assert report.equal == [["a.png", "copy.png"]]
    assert sorted(report.near) == [("a.png", "similar.jpg"), ("copy.png", "similar.jpg")]


def test_each_size_of_each_image_is_shown_with_its_texts(report: DataReport) -> None:
    assert [(one.name, one.size) for one in report.shown] == [
        (name, f"96x64 to {size}")
        for name in ("a.png", "copy.png", "other.png", "similar.jpg", "masked.png")
        for size in ("32x32", "80x48")
    ]
    *_, similar, _, masked = report.shown
    assert report.cut == len({c.read + c.cut for one in report.shown for c in one.captions if c.cut}) > 0
    (caption,) = similar.captions
    assert caption.read + caption.cut == LONG.strip()
    assert 0 < len(caption.read) < len(caption.cut)
    assert len(masked.captions) > 2
    assert all("ohwx" in caption.read + caption.cut for caption in masked.captions)
    assert masked.notes[-1] == "masked"


def test_a_picture_is_the_crop_and_darker_where_its_mask_is_black(report: DataReport) -> None:
    def values(number: int) -> numpy.ndarray:
        data = base64.b64decode(report.shown[number].picture.partition(",")[2])
        return numpy.asarray(Image.open(io.BytesIO(data)).convert("L"), dtype=float)

    plain, masked = values(0), values(-1)
    assert plain.shape == (64, 64)  # a square crop of 96 x 64
    assert masked.shape[1] / masked.shape[0] == pytest.approx(80 / 48, rel=0.05)
    whole = numpy.asarray(noise(3).convert("L"), dtype=float)
    half = masked.shape[1] // 2
    assert masked[:, half + 4 :].mean() < 0.35 * whole[:, 48:].mean()
    assert masked[:, : half - 4].mean() == pytest.approx(whole[:, :48].mean(), rel=0.1)


class Tags(HTMLParser):
    """Collects the tags, sources and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_one_file_in_which_captions_are_text(report: DataReport) -> None:
    page = Tags(data_page(report, "recipe.yaml"))
    assert len(page.sources) == len(report.shown)
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert not {"b", "script", "link"} & set(page.tags)
    assert "<b>bold</b> & ohwx" in page.text
    assert "first: 4 images, 8 views x 2" in page.text
    assert "equal: a.png, copy.png" in page.text


def test_more_images_than_the_page_may_show_are_counted(recipe: Path) -> None:
    report = check_data(load_recipe(recipe), QUIET, most=3)
    assert (len(report.shown), report.hidden) == (3, 7)
    assert report.equal == [["a.png", "copy.png"]]
    assert "7 more are not shown" in data_page(report, "recipe.yaml")


def test_the_command_writes_the_page(recipe: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["data", str(recipe), "--page", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    assert re.search(r"equal +a\.png, copy\.png", result.output)
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert not (tmp_path / "out").exists()


def test_damaged_images_and_missing_masks_are_named(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "first" / "other.png").write_bytes(b"damaged")
    (tmp_path / "second" / "masked.mask.png").unlink()
    result = CliRunner().invoke(app, ["data", str(recipe), "--page", str(tmp_path / "page.html")])
    assert result.exit_code == 3
    assert "other.png: cannot be decoded" in result.output
    assert "other.png: cannot be decoded" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("page", ["page.txt", "nowhere/page.html"])
def test_a_page_that_cannot_be_written_is_refused_first(recipe: Path, tmp_path: Path, page: str) -> None:
    result = CliRunner().invoke(app, ["data", str(recipe), "--page", str(tmp_path / page)])
    assert result.exit_code == 2
    assert "--page" in result.output


def test_similar_means_few_different_bits() -> None:
    codes = [0, 0b11111, 0b111111, 2**64 - 1]
    assert near_images(codes, ["a", "b", "c", "d"]) == [(0, 1), (1, 2)]
    assert near_images(codes[:2], ["a", "a"]) == []


def test_a_fingerprint_survives_scaling_and_compression() -> None:
    one = fingerprint(noise(5))
    stream = io.BytesIO()
    noise(5, (300, 200)).save(stream, "JPEG", quality=50)
    assert (one ^ fingerprint(Image.open(stream))).bit_count() <= 5
    assert (one ^ fingerprint(noise(6))).bit_count() > 10


def test_references_are_shown_with_their_crops(
    tmp_path: Path, mini_flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flux, "max_references", 2)
    (tmp_path / "after").mkdir()
    noise(1).save(tmp_path / "after" / "a.png")
    (tmp_path / "after" / "a.txt").write_text("make it <b>blue</b>")
    noise(2, (192, 128)).save(tmp_path / "after" / "a.ref0.png")
    noise(3, (64, 64)).save(tmp_path / "after" / "a.ref1.png")
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {{family: flux, path: {mini_flux}, max_sequence_length: 24}}\n"
        "data: {path: ./after, resolution: 64, references: {source: files}}\noutput: {dir: out}\n"
    )
    report = check_data(load_recipe(file), QUIET, most=100)
    (shown,) = report.shown
    assert [(one.name, one.size) for one in shown.references] == [
        ("a.ref0.png", "192x128 to 80x48"),
        ("a.ref1.png", "64x64 to 64x64"),
    ]
    assert any("2 reference images" in text and "left out" not in text for _, text in report_lines(report))
    page = data_page(report, "recipe")
    assert page.count("data:image/jpeg") == 3
    assert all(one.picture in page for one in shown.references)


def test_all_problems_are_listed_also_on_the_page(recipe: Path, tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / "first" / f"{number:02d}<b>.png").write_bytes(b"junk")
        (tmp_path / "first" / f"{number:02d}<b>.txt").write_text("x")
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["data", str(recipe), "--page", str(page)])
    assert result.exit_code == 3
    assert result.output.count("cannot be decoded") == 60
    text = page.read_text()
    assert "<h1>60 problems" in text
    assert (text.count("<li>"), text.count("<b>")) == (60, 0)
