"""Tests of the contact sheet at the end of a run, and of the distance of images from their references."""

import json
import random

import numpy
import pytest
import torch
from PIL import Image, ImageFont
from torchmetrics.functional.image import structural_similarity_index_measure

from halfbyte.trainer.data.prompts import references_for
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.errors import DataError, HalfbyteError
from halfbyte.trainer.sample.contact_sheet import Row, contact_sheet, fitted
from halfbyte.trainer.sample.image_distance import distance, picture_change, ssim
from halfbyte.trainer.sample.sampler import Drawn

from runs import run_here, write_pictures, write_recipe

FONT = ImageFont.load_default(14)


def plain(color, size=(64, 64)):
    return Image.new("RGB", size, color)


def speckled(seed, size=(64, 64)):
    values = numpy.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype="uint8")
    return Image.fromarray(values)


def colors_of(sheet):
    return {color for _, color in sheet.getcolors(1 << 24)}


def box_of(sheet, color):
    """Returns (left, top, right, bottom) of all pixels of one color."""
    mask = (numpy.asarray(sheet) == numpy.array(color)).all(-1)
    rows, columns = numpy.nonzero(mask)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


RED, GREEN, BLUE, YELLOW = (250, 10, 20), (10, 250, 20), (20, 10, 250), (250, 250, 10)


def test_layout_of_prompts_stages_and_training_images():
    rows = [Row("one", [plain(RED), plain(GREEN)]), Row("two", [plain(BLUE), None])]
    sheet = contact_sheet(["a run"], ["base", "base + LoRA"], rows, [plain(YELLOW)], of=1)
    red, green, blue, yellow = (box_of(sheet, color) for color in (RED, GREEN, BLUE, YELLOW))
    for box in (red, green, blue):
        assert (box[2] - box[0], box[3] - box[1]) == (192, 192), "64 pixels enlarged three times"
    assert red[1] == green[1]
    assert red[2] < green[0]
    assert red[0] == blue[0]
    assert red[3] < blue[1]
    assert yellow[0] > green[2]
    assert (yellow[2] - yellow[0], yellow[3] - yellow[1]) == (91, 91)
    assert yellow[2] < sheet.width
    assert blue[3] < sheet.height


def test_small_images_keep_their_pixels_and_large_ones_are_reduced():
    small = speckled(0)
    sheet = contact_sheet([], ["base"], [Row("", [small])], [], of=0)
    cell = sheet.crop((10, 10 + 2 * 22, 10 + 192, 10 + 2 * 22 + 192))
    assert cell.resize((64, 64), Image.Resampling.NEAREST).tobytes() == small.tobytes()
    wide = contact_sheet([], ["a", "b"], [Row("", [plain(RED, (1024, 512)), plain(GREEN)])], [], of=0)
    red = box_of(wide, RED)
    assert (red[2] - red[0], red[3] - red[1]) == (288, 144)
    middle = contact_sheet([], ["a"], [Row("", [plain(RED, (200, 160))])], [], of=0)
    red = box_of(middle, RED)
    assert (red[2] - red[0], red[3] - red[1]) == (200, 160)


@pytest.mark.parametrize("count", [1, 3, 12])
def test_a_sheet_shows_as_many_training_images_as_fit(count):
    shades = [(200, 5 * number, 7) for number in range(count)]
    rows = [Row("prompt", [plain(GREEN), plain(BLUE)])]
    sheet = contact_sheet(["x"], ["base", "LoRA"], rows, [plain(shade) for shade in shades], of=500)
    shown = [shade for shade in shades if shade in colors_of(sheet)]
    assert shown == shades[: len(shown)]
    assert len(shown) == min(count, 8), "four columns of two rows"
    for shade in shown:
        left, top, right, bottom = box_of(sheet, shade)
        assert (right - left, bottom - top) == (91, 91)
        assert right < sheet.width
        assert bottom < sheet.height


@pytest.mark.parametrize(
    "caption", ["", "short", "x" * 50_000, "two\nlines\tand\x07more\u202e", "漢字" * 200]
)
def test_captions_are_cut_to_one_line_that_fits(caption):
    text = fitted(caption, FONT, 150)
    assert FONT.getlength(text) <= 150
    assert text.isprintable()
    assert text == caption or "…" in text or "two lines and more" in text


def test_ssim_matches_torchmetrics():
    for seed in range(3):
        one, other = speckled(seed, (40, 32)), speckled(seed + 9, (40, 32))
        blend = Image.blend(one, other, 0.2 + 0.2 * seed)
        ours, theirs = (
            torch.from_numpy(numpy.asarray(p).copy()).permute(2, 0, 1).double() / 255 for p in (one, blend)
        )
        _, places = structural_similarity_index_measure(
            ours[None], theirs[None], data_range=1.0, sigma=1.5, return_full_image=True
        )
        # torchmetrics mirrors the image where the window of 11 pixels crosses the border; compare only the inside.
        assert ssim(ours, theirs) == pytest.approx(places[..., 5:-5, 5:-5].mean().item(), abs=1e-9)


def test_distances_of_known_images():
    same = distance(speckled(0), speckled(0))
    assert (same.rmse, same.ssim) == (0, pytest.approx(1))
    apart = distance(plain((0, 0, 0)), plain((255, 255, 255)))
    assert apart.rmse == 1
    assert apart.ssim < 1e-3
    assert distance(plain((0, 0, 0)), plain((51, 51, 51))).rmse == pytest.approx(0.2)
    assert distance(speckled(0), speckled(1)).ssim == pytest.approx(0, abs=0.05)


def test_the_change_is_the_mean_over_prompts_with_a_reference():
    drawn = [
        Drawn("a", plain((0, 0, 0)), plain((102, 102, 102)), plain((102, 102, 102))),
        Drawn("b", plain((0, 0, 0)), plain((51, 51, 51)), plain((102, 102, 102))),
        Drawn("c", plain((9, 9, 9)), plain((99, 99, 99)), None),
    ]
    change = picture_change(drawn)
    assert change.pictures == 2
    assert (change.base.rmse, change.trained.rmse) == (pytest.approx(0.4), pytest.approx(0.1))
    assert picture_change(drawn[2:]) is None


def test_references_are_found_by_caption(tmp_path):
    samples = read_samples(write_pictures(tmp_path / "pictures"))
    caption = "a gradient, number 3"
    found = references_for(["something else", caption], samples, tmp_path)
    assert {prompt: sample.path.name for prompt, sample in found.items()} == {caption: "picture3.png"}
    with pytest.raises(DataError, match=r"sample\.references: .*sample\.prompts.*number 0"):
        references_for(["something else"], samples, tmp_path)
    (tmp_path / "pictures" / "picture4.txt").write_text(caption)
    with pytest.raises(DataError, match=r"sample\.references: .*picture3\.png.*picture4\.png"):
        references_for([caption], read_samples(tmp_path / "pictures"), tmp_path)


def test_a_run_shows_and_measures_its_samples(mini_flux, tmp_path):
    recipe = write_recipe(tmp_path, mini_flux)
    prompts = "sample.prompts=[a gradient, 'a gradient, number 2']"
    folder = run_here(
        recipe,
        prompts,
        f"sample.references={tmp_path / 'pictures'}",
        "train.steps=1",
        "validation.held_out=1",
    )
    summary = json.loads((folder / "summary.json").read_text())
    base, trained = (
        Image.open(folder / "samples" / f"step-{step:06d}-01.png").convert("RGB") for step in (0, 1)
    )
    reference = Image.open(tmp_path / "pictures" / "picture2.png").convert("RGB")
    # The reference has 80 x 72 pixels; a square shows the middle 72 columns.
    reference = reference.crop((4, 0, 76, 72)).resize((64, 64), Image.Resampling.LANCZOS)
    expected = {
        "pictures": 1,
        "base": vars(distance(base, reference)),
        "trained": vars(distance(trained, reference)),
    }
    found = summary["pictures"]
    assert found["pictures"] == 1
    for stage in ("base", "trained"):
        assert found[stage] == pytest.approx(expected[stage], rel=1e-6)
    sheet = Image.open(summary["samples"]).convert("RGB")
    assert sheet.width > 3 * 192
    assert sheet.height > 2 * 192


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        (["sample.references=./nowhere"], "nowhere"),
        (["sample.prompts=[]", "sample.references=."], "sample.references"),
    ],
)
def test_mistakes_in_references_are_named(mini_flux, tmp_path, monkeypatch, settings, fragment):
    recipe = write_recipe(tmp_path, mini_flux)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HalfbyteError, match=fragment):
        run_here(recipe, *settings)


def test_a_sheet_of_many_images_of_odd_sizes():
    draws = random.Random(0)
    sizes = [(draws.randrange(1, 700), draws.randrange(1, 700)) for _ in range(24)]
    rows = [Row(f"{w} x {h}", [plain(RED, (w, h)), plain(GREEN, (h, w))]) for w, h in sizes[:4]]
    sheet = contact_sheet(
        ["heading " * 90], ["a", "b"], rows, [plain(BLUE, size) for size in sizes], of=len(sizes)
    )
    assert {RED, GREEN, BLUE} <= colors_of(sheet)
