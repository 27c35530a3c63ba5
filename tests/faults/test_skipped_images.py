"""Tests of `data.on_bad_image`: exactly the damaged images are named, and skipped ones are counted and listed."""

import logging
from pathlib import Path

import pytest
from PIL import Image

from halfbyte.trainer.data.read_sets import read_data
from halfbyte.trainer.data.sources.left_out import DAMAGED
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.plan.fit import open_planner
from halfbyte.trainer.recipe.load import load_recipe

from runs import results, run_here, write_recipe

KINDS = (
    lambda data: b"",
    lambda data: data[: len(data) // 2],
    lambda data: b"not an image",
    lambda data: data[:40] + b"\xff" * 40 + data[80:],
)


def write_pictures(folder: Path, count: int, bad: int) -> list[str]:
    """Writes images with captions, `bad` of them damaged in four ways; returns the names of these."""
    folder.mkdir()
    names = []
    for number in range(count):
        file = folder / f"{number:04d}.png"
        Image.effect_noise((40, 40), 50).save(file)
        file.with_suffix(".txt").write_text("noise")
        if number % (count // bad) == 7 and len(names) < bad:
            file.write_bytes(KINDS[len(names) % len(KINDS)](file.read_bytes()))
            names.append(file.name)
    assert len(names) == bad
    return names


def read(folder: Path, on_bad_image: str):
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "model: {family: flux, path: owner/name}\n"
        f"data: {{path: ./pictures, resolution: 32, on_bad_image: {on_bad_image}}}\noutput: {{dir: out}}\n"
    )
    return read_data(load_recipe(recipe), is_decoded=lambda _: False)


def test_sixty_of_a_thousand_are_sixty(tmp_path, caplog):
    bad = write_pictures(tmp_path / "pictures", 1000, 60)
    with pytest.raises(DataError) as caught:
        read(tmp_path, "error")
    lines = str(caught.value).splitlines()
    assert [line.partition(".png")[0][-4:] + ".png" for line in lines[:50]] == bad[:50]
    assert lines[50:] == ["... and 10 more like these"]

    with caplog.at_level(logging.WARNING):
        (only,) = read(tmp_path, "skip").sets
    assert len(only.samples) == 940
    assert [Path(name).name for name in only.left_out.of(DAMAGED)] == bad
    assert not {sample.path.name for sample in only.samples} & set(bad)
    assert "60 of 1000 images are skipped" in caplog.text
    assert bad[0] in caplog.text
    assert f"{DAMAGED}: 60" in only.left_out.describe(tmp_path / "pictures")


def test_a_folder_of_damaged_images_only_is_refused(tmp_path):
    write_pictures(tmp_path / "pictures", 8, 1)
    for file in (tmp_path / "pictures").glob("*.png"):
        file.write_bytes(b"damaged")
    with pytest.raises(DataError, match="none of its 8 images can be used"):
        read(tmp_path, "skip")


def test_problems_of_captions_are_not_skipped(tmp_path):
    write_pictures(tmp_path / "pictures", 8, 1)
    (tmp_path / "pictures" / "0002.txt").unlink()
    with pytest.raises(DataError, match=r"0002\.png: has no caption"):
        read(tmp_path, "skip")


def test_a_run_lists_them_at_the_end_and_trains_as_without_them(tmp_path, mini_flux):
    recipe = write_recipe(tmp_path, mini_flux)
    recipe.write_text(recipe.read_text().replace("path: ./pictures", "path: ./pictures, on_bad_image: skip"))
    run_here(recipe, f"output.dir={tmp_path / 'whole'}")
    damaged = tmp_path / "pictures" / "zebra.png"
    damaged.write_bytes(b"damaged")
    damaged.with_suffix(".txt").write_text("a zebra")
    run_here(recipe)
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    assert '"skipped": [' in (tmp_path / "run" / "summary.json").read_text()
    assert "zebra.png" in (tmp_path / "run" / "summary.json").read_text()


def test_a_plan_leaves_them_out_too(tmp_path, mini_flux):
    recipe = write_recipe(tmp_path, mini_flux)
    (tmp_path / "pictures" / "zebra.png").write_bytes(b"damaged")
    (tmp_path / "pictures" / "zebra.txt").write_text("a zebra")
    counts = [
        open_planner(load_recipe(recipe, [f"data.on_bad_image={choice}"])).pictures.count
        for choice in ("error", "skip")
    ]
    assert counts == [None, 6]
