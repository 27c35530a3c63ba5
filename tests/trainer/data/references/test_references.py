"""Tests of finding reference images: next to the images, in folders and in tables; and of those that cannot be used."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from halfbyte.trainer.data.batches import PlannedBatches, TrainingSet, collate
from halfbyte.trainer.data.cache.encodings import encode_missing
from halfbyte.trainer.data.read_sets import ReadData, held_out_views, read_data, summaries, training_views
from halfbyte.trainer.data.record import read_record, recorded, require_same, write_record
from halfbyte.trainer.data.views.order import SampleOrder
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.recipe.load import load_recipe

from counting_encoders import CountingEncoders, write_pictures
from steps import family_at

Color = tuple[int, int, int]
FILES, COLUMNS = "{source: files}", "{source: columns}"
FOLDERS = "{source: folders, folders: [./before]}"


@pytest.fixture(autouse=True)
def takes_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the family flux take two reference images."""
    monkeypatch.setattr(Flux, "max_references", 2)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures")


def solid(color: Color, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, color)


def encoded(color: Color, size: tuple[int, int] = (64, 48)) -> bytes:
    stream = io.BytesIO()
    solid(color, size).save(stream, "PNG")
    return stream.getvalue()


def write_before(pictures: Path, folder: str = "before", names: str = "abcd") -> Path:
    """Writes a reference of the same shape for each image, with its number as the color."""
    before = pictures.parent / folder
    before.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        with Image.open(pictures / f"{name}.png") as image:
            solid((number, number, number), image.size).save(before / f"{name}.png")
    return before


def read_in(folder: Path, references: str, path: str = "./pictures", more: str = "") -> ReadData:
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "model: {family: flux, path: owner/name}\n"
        f"data: {{path: {path}, resolution: 32, references: {references}{more}}}\noutput: {{dir: out}}\n"
    )
    return read_data(load_recipe(recipe), is_decoded=lambda _: False)


def found(data: ReadData) -> dict[str, list[str]]:
    return {sample.path.name: [one.path.name for one in sample.references] for sample in data.samples()}


def problems(folder: Path, references: str, path: str = "./pictures") -> list[str]:
    with pytest.raises(DataError) as caught:
        read_in(folder, references, path)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_references_next_to_their_images(pictures: Path) -> None:
    for number, name in enumerate(("a.ref0", "b.ref0", "b.ref1", "c.REF0", "d.ref0", "other.ref0")):
        solid((number, 0, 0)).save(pictures / f"{name}.png")
    data = read_in(pictures.parent, FILES)
    assert found(data) == {
        "a.png": ["a.ref0.png"],
        "b.png": ["b.ref0.png", "b.ref1.png"],
        "c.png": ["c.REF0.png"],
        "d.png": ["d.ref0.png"],
    }
    assert {path.name for path in data.sets[0].left_out.reasons} == {"other.ref0.png"}


@pytest.mark.parametrize("inside", [False, True])
def test_references_in_folders(pictures: Path, inside: bool) -> None:
    (pictures / "deep").mkdir()
    for suffix in (".png", ".txt"):
        (pictures / f"a{suffix}").rename(pictures / "deep" / f"a{suffix}")
    folder = "pictures/before" if inside else "before"
    before = pictures.parent / folder
    (before / "deep").mkdir(parents=True)
    for name in ("deep/a.jpg", "b.png", "c.webp", "d.png"):
        solid((9, 9, 9)).save(before / name)
    other = write_before(pictures, "second", "bcd")
    (other / "deep").mkdir()
    solid((1, 2, 3)).save(other / "deep" / "a.png")
    data = read_in(pictures.parent, f"{{source: folders, folders: [./{folder}, ./second]}}")
    assert found(data) == {
        "b.png": ["b.png", "b.png"],
        "c.png": ["c.webp", "c.png"],
        "d.png": ["d.png", "d.png"],
        "a.png": ["a.jpg", "a.png"],
    }
    assert data.sets[0].left_out.reasons == {}


def write_table(pictures: Path, rows: dict[str, dict[str, object]]) -> None:
    lines = [{"file_name": f"{name}.png", "text": f"cap {name}", **row} for name, row in rows.items()]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ({name: {"reference": f"{name}-old.png"} for name in "abcd"}, ""),
        ({name: {"references": [f"{name}-old.png"]} for name in "abcd"}, ""),
        ({name: {"ref1": None, "ref0": f"{name}-old.png"} for name in "abcd"}, ""),
        ({name: {"before": f"{name}-old.png"} for name in "abcd"}, ", columns: [before]"),
    ],
)
def test_references_in_metadata_are_not_trained(
    pictures: Path, rows: dict[str, dict[str, object]], columns: str
) -> None:
    for number, name in enumerate("abcd"):
        solid((number, 7, 7)).save(pictures / f"{name}-old.png")
    write_table(pictures, rows)
    data = read_in(pictures.parent, f"{{source: columns{columns}}}")
    assert found(data) == {f"{name}.png": [f"{name}-old.png"] for name in "abcd"}
    assert data.sets[0].left_out.reasons == {}


def test_an_image_may_be_a_target_and_a_reference(pictures: Path) -> None:
    write_table(pictures, {"a": {}, "b": {"reference": "a.png"}, "c": {"reference": "b.png"}, "d": {}})
    data = read_in(pictures.parent, "{source: columns, missing: none}")
    assert found(data) == {"a.png": [], "b.png": ["a.png"], "c.png": ["b.png"], "d.png": []}


def test_references_in_parquet_files(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    rows = [
        {
            "image": {"bytes": encoded((number, 0, 0)), "path": None},
            "text": f"cap {number}",
            "before": [{"bytes": encoded((0, number, other)), "path": None} for other in range(number % 3)],
            "mark": encoded((0, 0, 99)) if number % 3 == 1 else None,
        }
        for number in range(7)
    ]
    table = tmp_path / "pictures" / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table, row_group_size=2)
    data = read_in(tmp_path, "{source: columns, columns: [before], missing: none}")
    assert [len(sample.references) for sample in data.samples()] == [0, 1, 2, 0, 1, 2, 0]
    both = read_in(tmp_path, "{source: columns, columns: [before, mark], missing: none}").samples()[1]
    assert [one.cell.column for one in both.references] == ["before", "mark"]
    (line,) = problems(tmp_path, COLUMNS)
    assert line.startswith("pictures/rows.parquet: ")
    assert "references.columns" not in line
    assert "before" in line
    single = read_in(
        tmp_path, "{source: columns, columns: [before], missing: none}", "./pictures/rows.parquet"
    )
    assert [one.sha256 for sample in single.samples() for one in sample.references] == [
        one.sha256 for sample in data.samples() for one in sample.references
    ]
    (line, *_) = problems(tmp_path, FILES)
    assert "source: columns" in line


def no_reference(before: Path) -> None:
    (before / "a.png").unlink()


def damaged(before: Path) -> None:
    (before / "a.png").write_bytes((before / "a.png").read_bytes()[:60])


def empty(before: Path) -> None:
    (before / "a.png").write_bytes(b"")


def other_format(before: Path) -> None:
    (before / "a.png").rename(before / "a.heic")


def two_files(before: Path) -> None:
    solid((1, 1, 1)).save(before / "a.jpg")


def outside(before: Path) -> None:
    (before / "a.png").rename(before.parent / "away.png")
    (before / "a.png").symlink_to(before.parent / "away.png")


def folder(before: Path) -> None:
    no_reference(before)
    (before / "a.png").mkdir()


@pytest.mark.parametrize(
    ("spoil", "where", "what"),
    [
        (no_reference, "pictures/a.png", "before/a.png"),
        (damaged, "before/a.png", "cannot be decoded"),
        (empty, "before/a.png", "0 bytes"),
        (other_format, "before/a.heic", "convert"),
        (two_files, "before/a.jpg", "a.png"),
        (outside, "before/a.png", "symbolic link"),
        (folder, "pictures/a.png", "before/a.png"),
    ],
)
def test_every_reference_that_cannot_be_used_is_reported(
    pictures: Path, spoil: Callable[[Path], None], where: str, what: str
) -> None:
    before = write_before(pictures)
    spoil(before)
    (line,) = problems(pictures.parent, FOLDERS)
    assert line.startswith(f"{where}: ")
    assert what in line


def test_a_gap_between_references_is_reported(pictures: Path) -> None:
    for name in ("a.ref0", "b.ref1", "c.ref0", "d.ref0"):
        solid((5, 5, 5)).save(pictures / f"{name}.png")
    (line,) = problems(pictures.parent, "{source: files, missing: none}")
    assert line.startswith("pictures/b.png: ")
    assert "b.ref0.png" in line


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("../../away.png", "outside"),
        ("none.png", "none.png"),
        (7, "7"),
        ([None, "b.png"], "null"),
        ({"bytes": "x"}, "expected an image"),
    ],
)
def test_a_cell_that_cannot_be_used_is_reported(pictures: Path, value: object, what: str) -> None:
    write_table(pictures, {"a": {"reference": value}, **{name: {"reference": "d.png"} for name in "bcd"}})
    (line,) = problems(pictures.parent, COLUMNS)
    assert line.startswith("pictures/metadata.jsonl:1, reference: ")
    assert what in line


def test_images_without_references_on_request(pictures: Path) -> None:
    write_before(pictures, names="ab")
    assert len(problems(pictures.parent, FOLDERS)) == 2
    data = read_in(pictures.parent, "{source: folders, folders: [./before], missing: none}")
    assert [len(sample.references) for sample in data.samples()] == [1, 1, 0, 0]


def test_an_image_that_is_its_own_reference_is_a_warning(
    pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = write_before(pictures)
    read_in(pictures.parent, FOLDERS)
    assert caplog.text == ""
    (before / "b.png").write_bytes((pictures / "b.png").read_bytes())
    read_in(pictures.parent, FOLDERS)
    assert "1 of 4 " in caplog.text
    assert "b.png" in caplog.text


def test_more_references_than_the_model_takes_are_refused(
    pictures: Path, mini_flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.ref0", "b.ref0", "b.ref1"):
        solid((5, 5, 5)).save(pictures / f"{name}.png")
    data = read_in(pictures.parent, "{source: files, missing: none}")
    family = family_at(mini_flux, Flux)
    training_views(data, family, seed=0)
    monkeypatch.setattr(Flux, "max_references", 1)
    with pytest.raises(DataError, match=r"b\.png: .*2 .*at most 1") as caught:
        training_views(data, family, seed=0)
    assert len(str(caught.value).splitlines()) == 1


def test_a_resumed_run_notices_other_references(pictures: Path, tmp_path: Path) -> None:
    before = write_before(pictures)

    def record() -> list[object]:
        return recorded(read_in(pictures.parent, FOLDERS).samples(), pictures, held_out=False)

    file = tmp_path / "record.gz"
    write_record(file, record())
    assert read_record(file) == list(record())
    require_same(file, record())
    solid((200, 0, 0)).save(before / "c.png")
    with pytest.raises(DataError, match=r"1 image with other references: c\.png"):
        require_same(file, record())


def test_held_out_images_keep_their_references(pictures: Path, tmp_path: Path, mini_flux: Path) -> None:
    write_before(pictures)
    family = family_at(mini_flux, Flux)
    recipe = tmp_path / "recipe.yaml"
    text = (
        "model: {family: flux, path: owner/name}\n"
        f"data: {{path: ./pictures, resolution: 32, flip: true, references: {FOLDERS}}}\n"
        "validation: {VALIDATION}\noutput: {dir: out}\n"
    )
    recipe.write_text(text.replace("{VALIDATION}", "{held_out: 2}"))
    data = read_data(load_recipe(recipe), is_decoded=lambda _: False)
    views = held_out_views(data, family, seed=0)
    assert [[one.sample.path.name for one in view.references] for view in views] == [
        [view.sample.path.name] for view in views
    ]
    # Images of a folder for validation have theirs where the first data set has them.
    away = tmp_path / "held"
    away.mkdir()
    for suffix in (".png", ".txt"):
        (pictures / f"a{suffix}").rename(away / f"a{suffix}")
    recipe.write_text(text.replace("{VALIDATION}", "{path: ./held}"))
    data = read_data(load_recipe(recipe), is_decoded=lambda _: False)
    assert [one.path for sample in data.held_out_samples for one in sample.references] == [
        tmp_path / "before" / "a.png"
    ]


def test_batches_hold_the_references_of_their_images(pictures: Path, tmp_path: Path, mini_flux: Path) -> None:
    """The reference of each image has its number as the color, and so does the image."""
    write_before(pictures)
    solid((77, 77, 77), (48, 48)).save(pictures.parent / "before" / "d.png")
    wide = pictures.parent / "wide"
    wide.mkdir()
    for name in "abcd":
        solid((200, 200, 200), (128, 32)).save(wide / f"{name}.png")
    data = read_in(pictures.parent, "{source: folders, folders: [./before, ./wide]}", more=", flip: true")
    ordered = training_views(data, family_at(mini_flux, Flux), seed=0)
    assert [one.references for one in summaries(data, ordered)] == [8]
    views = [view for one in ordered for group in one.views for view in group]
    every = [one for view in views for one in (view, *view.references)]
    encoders = CountingEncoders()
    caches = encode_missing(tmp_path / "cache", encoders, every, [f"cap {name}" for name in "abcd"])
    # Each file is encoded once for each size and direction: the wide ones have the same bytes.
    assert len(encoders.pictures) == (4 + 4 + 1) * 2
    order = SampleOrder(ordered, seed=0, global_batch=2)
    batches = PlannedBatches(order, rank=0, processes=1, start=0, stop=12)
    data_set = TrainingSet(*caches, [data.sets[0].settings])
    for batch in DataLoader(data_set, batch_sampler=batches, collate_fn=collate):
        before, wide_one = batch.references
        assert before.shape == batch.latent_mean.shape
        assert wide_one.shape == (2, 3, 16 // 8, 64 // 8)
        colors = ((before[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        images = ((batch.latent_mean[:, 0, 0, 0] + 1) * 127.5 / 60).round().int().tolist()
        assert colors == [77 if image == 3 else image for image in images]
        moved = batch.to("meta")
        assert all(one.is_meta for one in moved.references)
        assert torch.allclose(wide_one, torch.tensor(200 / 127.5 - 1))
