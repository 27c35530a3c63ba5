"""Tests of training data that change between the stop and the resume of a run, or while it trains."""

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

import halfbyte.trainer.run as story
from halfbyte.trainer.data.record import (
    Recorded,
    RecordedSample,
    read_record,
    recorded,
    require_same,
    write_record,
)
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.errors import DataError, RecipeError
from halfbyte.trainer.export.export import ADAPTER_FILE
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.run_folder.folder import RunFolder, claim

from runs import run_here, write_pictures, write_recipe

QUICK = ("output.export_base=false", "sample.prompts=[]", "train.grad_accumulation=1")
RECORD = "training_data.jsonl.gz"


def record_of(folder: Path, prefix: str = "") -> Recorded:
    return recorded(read_samples(folder, CaptionStyle(prefix)), folder, held_out=False)


def new_caption(data: Path) -> None:
    (data / "picture1.txt").write_text("something else entirely")


def new_image(data: Path) -> None:
    shutil.copy(data / "picture2.png", data / "picture1.png")


def remove(data: Path) -> None:
    (data / "picture1.png").unlink()
    (data / "picture1.txt").unlink()


def add(data: Path) -> None:
    Image.new("RGB", (80, 80), "red").save(data / "new.png")
    (data / "new.txt").write_text("a red square")


def reorder(data: Path) -> None:
    for kind in ("png", "txt"):
        (data / f"picture1.{kind}").rename(data / f"zebra.{kind}")


def swap_captions(data: Path) -> None:
    texts = [(data / f"picture{number}.txt").read_text() for number in (1, 2)]
    for number, text in zip((2, 1), texts, strict=True):
        (data / f"picture{number}.txt").write_text(text)


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (new_caption, ["1 caption changed: picture1.png"]),
        (new_image, ["1 image changed: picture1.png"]),
        (remove, ["1 image missing: picture1.png"]),
        (add, ["1 image new: new.png"]),
        (reorder, ["1 image renamed, which changes the order: picture1.png"]),
        (swap_captions, ["2 captions changed: picture1.png, picture2.png"]),
    ],
)
def test_each_change_is_named(tmp_path: Path, change: Callable[[Path], None], lines: list[str]) -> None:
    data = write_pictures(tmp_path / "data")
    file = tmp_path / RECORD
    write_record(file, record_of(data))
    require_same(file, record_of(data))
    change(data)
    with pytest.raises(DataError) as caught:
        require_same(file, record_of(data))
    found = [line.strip() for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert found == lines
    assert f"lora.init_from={tmp_path}" in str(caught.value)


def test_many_changes_are_counted(tmp_path: Path) -> None:
    before = [RecordedSample(f"{number}.png", f"{number:064x}", "c", False) for number in range(100)]
    write_record(tmp_path / RECORD, before)
    with pytest.raises(DataError) as caught:
        require_same(tmp_path / RECORD, [*before[:40], *before[70:]])
    assert "30 images missing: 40.png, 41.png, 42.png, 43.png, 44.png and 25 more" in str(caught.value)
    with pytest.raises(DataError, match="order of the images"):
        require_same(tmp_path / RECORD, before[::-1])


def test_renamed_and_moved_files_in_the_same_order_are_the_same_data(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data")
    write_record(tmp_path / RECORD, record_of(data))
    moved = tmp_path / "moved"
    data.rename(moved)
    for file in list(moved.iterdir()):
        file.rename(file.with_name(f"a_{file.name}"))
    require_same(tmp_path / RECORD, record_of(moved))
    with pytest.raises(DataError):
        require_same(tmp_path / RECORD, record_of(moved, "a prefix"))


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    file = tmp_path / RECORD
    samples = record_of(write_pictures(tmp_path / "data"))
    write_record(file, samples)
    intact = file.read_bytes()
    places = random.Random(0)
    for _ in range(200):
        damaged = bytearray(intact)
        place = places.randrange(len(intact))
        damaged[place] ^= 1 << places.randrange(8)
        file.write_bytes(damaged)
        try:
            found = read_record(file)
        except DataError:
            continue
        # gzip's head holds a time and the system's name, which nothing reads, and the last bits before its checksum
        # fill up a byte.
        assert 3 <= place < 10 or place == len(intact) - 9
        assert found == list(samples)
    for length in range(len(intact)):
        file.write_bytes(intact[:length])
        with pytest.raises(DataError, match="delete it to allow that"):
            read_record(file)


def test_a_run_resumes_over_the_data_of_its_start_only(mini_flux: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, mini_flux)
    held_out = "validation.held_out=1"
    run = run_here(recipe, *QUICK, held_out, "train.steps=1")
    assert sorted(sample.held_out for sample in read_record(run / RECORD)) == [False] * 5 + [True]

    # Changed data are refused before anything is encoded or written.
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    cached = sorted((tmp_path / "cache").rglob("*"))
    intact = tmp_path / "intact"
    shutil.copytree(tmp_path / "pictures", intact)
    new_caption(tmp_path / "pictures")
    with pytest.raises(DataError, match="caption changed: picture1"):
        run_here(recipe, *QUICK, held_out, "train.steps=3", resume=True)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    assert sorted((tmp_path / "cache").rglob("*")) == cached

    # The same bytes at another place are accepted, and the record stays.
    moved = f"data.path={intact}"
    run_here(recipe, *QUICK, held_out, moved, "train.steps=2", resume=True)
    assert (run / RECORD).read_bytes() == before[run / RECORD]

    # A run of an older version has no record: its data may not move.
    (run / RECORD).unlink()
    with pytest.raises(RecipeError, match=r"data\.path"):
        claim(RunFolder(run), load_recipe(recipe, [*QUICK, held_out, "train.steps=4"]), resume=True)


def test_a_run_without_a_record_continues_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    require_same(tmp_path / RECORD, record_of(write_pictures(tmp_path / "data")))
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert str(tmp_path / RECORD) in line


def gone(data: Path) -> None:
    shutil.rmtree(data)


@pytest.mark.parametrize("what", [new_image, gone])
def test_images_that_change_during_the_run_do_not_prevent_the_export(
    mini_flux: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: Callable[[Path], None],
) -> None:
    recipe = write_recipe(tmp_path, mini_flux)
    shutil.copytree(tmp_path / "pictures", tmp_path / "references")
    train = story.train

    def training(*arguments: object) -> object:
        finished = train(*arguments)
        what(tmp_path / "pictures")
        what(tmp_path / "references")
        return finished

    monkeypatch.setattr(story, "train", training)
    settings = (
        "sample.prompts=['a gradient, number 1', 'a gradient, number 2']",
        f"sample.references={tmp_path / 'references'}",
        "train.steps=1",
        "output.export_base=false",
        "train.grad_accumulation=1",
    )
    run = run_here(recipe, *settings)
    assert all(tensor.isfinite().all() for tensor in load_file(run / "adapter" / ADAPTER_FILE).values())
    assert (run / "summary.json").is_file()
    assert (run / "samples.png").is_file()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    (sheet,) = [line for line in warnings if "sheet of samples" in line]
    assert str(tmp_path / "pictures" / ("picture0.png" if what is gone else "picture1.png")) in sheet
    references = [line for line in warnings if "sample.references" in line]
    assert len(references) == (2 if what is gone else 1)
    assert str(tmp_path / "references" / "picture1.png") in references[0]
