"""Tests that tar files, saved data sets and tables give the samples of the same images in a folder."""

import io
import os
import tarfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as PictureFeature
from PIL import Image

from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.data.sources import reading
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.contents import load_mask, sample_bytes
from halfbyte.trainer.data.sources.found import SourceSettings
from halfbyte.trainer.data.sources.left_out import LeftOut
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.data.views.buckets import Cropping, views_of
from halfbyte.trainer.data.views.order import OrderedSet, SampleOrder
from halfbyte.trainer.errors import DataError, RecipeError
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.plan.pictures import planned_pictures
from halfbyte.trainer.recipe.data_section import MaskedLoss
from halfbyte.trainer.recipe.load import load_recipe

from steps import family_at

NAMES = [f"{number:03d}" for number in range(7)]
MASKED = SourceSettings(masks=MaskedLoss(source="files"))


def png(color: object, size: tuple[int, int] = (20, 10), mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, color).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven images with captions and masks."""
    root = tmp_path / "folder"
    root.mkdir()
    for number, name in enumerate(NAMES):
        (root / f"{name}.png").write_bytes(png((30 * number, 0, 0), (20 + number, 10)))
        (root / f"{name}.txt").write_text(f"caption {number}")
        (root / f"{name}.mask.png").write_bytes(png(200 + number, (20 + number, 10), "L"))
    return root


def pack(path: Path, files: Sequence[Path], root: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for file in files:
            tar.add(file, file.relative_to(root).as_posix())
    return path


def rows(folder: Path, masks: bool) -> dict[str, list[object]]:
    pictures = [folder / f"{name}.png" for name in NAMES]
    table: dict[str, list[object]] = {
        "image": [{"bytes": file.read_bytes(), "path": None} for file in pictures],
        "text": [file.with_suffix(".txt").read_text() for file in pictures],
    }
    if masks:
        table["mask"] = [
            {"bytes": file.with_suffix(".mask.png").read_bytes(), "path": None} for file in pictures
        ]
    return table


FEATURES = Features({"image": PictureFeature(decode=False), "text": Value("string")})


def as_tars(folder: Path, to: Path) -> Path:
    files = sorted(folder.iterdir())
    for number, own in enumerate(
        ([f for f in files if f.name < "003"], [f for f in files if f.name >= "003"])
    ):
        pack(to / f"{number}.tar", own, folder)
    return to


def as_one_tar(folder: Path, to: Path) -> Path:
    return pack(to / "all.tar", sorted(folder.iterdir(), reverse=True), folder)


def as_pattern(folder: Path, to: Path) -> Path:
    return as_tars(folder, to) / "{0..1}.tar"


def as_saved(folder: Path, to: Path) -> Path:
    Dataset.from_dict(rows(folder, False), features=FEATURES).save_to_disk(to, num_shards=2)
    return to


def as_saved_splits(folder: Path, to: Path) -> Path:
    whole = Dataset.from_dict(rows(folder, False), features=FEATURES)
    DatasetDict(train=whole, test=whole.select([0])).save_to_disk(to)
    return to


def as_parquet(folder: Path, to: Path, masks: bool = False) -> Path:
    to.mkdir()
    pyarrow.parquet.write_table(pyarrow.table(rows(folder, masks)), to / "a.parquet", row_group_size=3)
    return to


FORMS = [as_tars, as_one_tar, as_pattern, as_saved, as_saved_splits, as_parquet]


def facts(samples: Sequence[Sample]) -> list[object]:
    return [(one.index, one.caption, one.width, one.height, one.sha256, one.captions) for one in samples]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_has_the_samples_of_the_folder(
    folder: Path, tmp_path: Path, form: Callable[[Path, Path], Path]
) -> None:
    style, expected = CaptionStyle("a photo of"), read_samples(folder, CaptionStyle("a photo of"))
    path = form(folder, tmp_path / "other")
    for settings in (SourceSettings(), SourceSettings(tables=tmp_path / "tables")):
        samples = read_samples(path, style, settings)
        assert facts(samples) == facts(expected)
        assert [sample_bytes(one) for one in samples] == [sample_bytes(one) for one in expected]
        assert [samples[place] for place in range(len(samples))] == list(samples)
    assert facts(samples[1::2]) == facts(list(expected)[1::2])


@pytest.mark.parametrize("form", [as_tars, as_one_tar, lambda folder, to: as_parquet(folder, to, True)])
def test_each_form_has_the_masks_of_the_folder(
    folder: Path, tmp_path: Path, form: Callable[[Path, Path], Path]
) -> None:
    expected = read_samples(folder, settings=MASKED)
    samples = read_samples(form(folder, tmp_path / "other"), settings=MASKED)
    assert [load_mask(one).tobytes() for one in samples] == [load_mask(one).tobytes() for one in expected]


def test_masks_in_a_tar_file_are_counted_if_they_are_not_used(folder: Path, tmp_path: Path) -> None:
    path = as_tars(folder, tmp_path / "tars")
    for _ in range(2):  # read, and from the table
        left_out = LeftOut()
        read_samples(path, settings=SourceSettings(tables=tmp_path / "tables"), left_out=left_out)
        assert [(reason, count) for reason, _, count in left_out.groups()] == [("masks", 7)]


def test_columns_with_other_names(folder: Path, tmp_path: Path) -> None:
    table = rows(folder, False)
    table = {"jpg": table["image"], "blip": table["text"], "text": ["other"] * len(NAMES)}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    settings = SourceSettings(image_column="jpg", caption_column="blip")
    assert facts(read_samples(tmp_path / "a.parquet", settings=settings)) == facts(read_samples(folder))
    with pytest.raises(DataError, match=r"data\.image_column.*has no tables"):
        read_samples(folder, settings=settings)


def test_a_split_that_a_saved_data_set_lacks(folder: Path, tmp_path: Path) -> None:
    path = as_saved_splits(folder, tmp_path / "saved")
    assert len(read_samples(path, settings=SourceSettings(split="test"))) == 1
    with pytest.raises(DataError, match=r"'dev', expected train or test"):
        read_samples(path, settings=SourceSettings(split="dev"))
    with pytest.raises(DataError, match=r"data\.split"):
        read_samples(folder, settings=SourceSettings(split="train"))


@pytest.mark.parametrize("missing", ["caption", "mask"])
def test_what_a_tar_file_lacks_is_named(folder: Path, tmp_path: Path, missing: str) -> None:
    (folder / f"002.{'txt' if missing == 'caption' else 'mask.png'}").unlink()
    path = as_tars(folder, tmp_path / "tars")
    with pytest.raises(DataError) as caught:
        read_samples(path, settings=MASKED)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path / '0.tar' / '002.png'}: has ")
    assert missing in line


def test_only_files_that_changed_are_read_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = as_tars(folder, tmp_path / "tars")
    for file in (*folder.iterdir(), *tars.iterdir()):
        os.utime(file, (1, 1))
    opened: list[bytes] = []
    decoded_size = reading.decoded_size
    monkeypatch.setattr(reading, "decoded_size", lambda data: opened.append(data) or decoded_size(data))
    settings = SourceSettings(tables=tmp_path / "tables", masks=MASKED.masks)

    def number_read(path: Path) -> int:
        opened.clear()
        read_samples(path, settings=settings)
        return len(opened)

    assert [number_read(folder), number_read(folder)] == [7, 0]
    assert [number_read(tars), number_read(tars)] == [7, 0]
    (folder / "003.txt").write_text("another caption")
    assert number_read(folder) == 0
    assert read_samples(folder, settings=settings)[3].caption == "another caption"
    os.utime(folder / "004.mask.png", (2, 2))
    assert number_read(folder) == 1
    (folder / "000.png").unlink()
    (folder / "0001.png").write_bytes(png("blue"))
    (folder / "0001.txt").write_text("new")
    (folder / "0001.mask.png").write_bytes(png(255, mode="L"))
    assert number_read(folder) == 1
    assert facts(read_samples(folder, settings=settings)) == facts(read_samples(folder, settings=MASKED))
    os.utime(tars / "1.tar", (2, 2))
    assert number_read(tars) == 4
    # A damaged table is made again.
    for file in (tmp_path / "tables").iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert number_read(tars) == 7
    assert number_read(tars) == 0


@pytest.mark.parametrize("form", [lambda folder, to: folder, as_tars])
def test_a_start_that_is_stopped_keeps_what_it_has_read(
    folder: Path, tmp_path: Path, form: Callable[[Path, Path], Path]
) -> None:
    path = form(folder, tmp_path / "other")
    for file in path.iterdir():
        os.utime(file, (1, 1))
    settings = SourceSettings(tables=tmp_path / "tables")
    counts: list[int] = []

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_samples(path, settings=settings, progress=stop)
    samples = read_samples(path, settings=settings, is_decoded=lambda sha256: counts.append(1) is not None)
    assert facts(samples) == facts(read_samples(folder))
    assert len(counts) == (2 if path == folder else 4)  # of the tar files, the first was complete


def test_bad_images_are_listed_at_each_start(folder: Path, tmp_path: Path) -> None:
    (folder / "002.png").write_bytes(b"junk")
    tars = as_tars(folder, tmp_path / "tars")
    for file in tars.iterdir():
        os.utime(file, (1, 1))
    for path in (folder, tars):
        for skip in (False, True, False, True):
            settings = SourceSettings(tables=tmp_path / "tables", skip_bad=skip)
            left_out = LeftOut()
            if not skip:
                with pytest.raises(DataError, match=r"002\.png: cannot be decoded"):
                    read_samples(path, settings=settings)
                continue
            samples = read_samples(path, settings=settings, left_out=left_out)
            assert [one.index for one in samples] == list(range(6))
            assert [Path(name).name for name in left_out.of("damaged images")] == ["002.png"]


def test_all_problems_are_listed_on_request(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number:02d}.png").write_bytes(b"junk")
        (tmp_path / f"{number:02d}.txt").write_text("x")
    for most, lines in ((50, 51), (None, 60)):
        with pytest.raises(DataError) as caught:
            read_samples(tmp_path, settings=SourceSettings(most_problems=most))
        assert len(str(caught.value).splitlines()) == lines


def test_file_names_need_not_be_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(png("red"))
    (sample,) = read_samples(tmp_path, CaptionStyle("x"), SourceSettings(tables=tmp_path / "tables"))
    assert sample.path.name == name


def test_views_and_their_order_are_those_of_the_folder(folder: Path, tmp_path: Path) -> None:
    croppings = [Cropping(side, 16, crop="random", random_crops=2, flip=True) for side in (32, 64)]
    own = read_samples(as_tars(folder, tmp_path / "tars"))
    groups = views_of(own, croppings, seed=3)
    as_list = views_of(list(own), croppings, seed=3)
    assert list(groups) == list(as_list) == [groups[place] for place in range(len(groups))]
    assert groups.view_count == sum(map(len, groups))
    expected = views_of(read_samples(folder), croppings, seed=3)
    orders = [
        SampleOrder([OrderedSet(views, len(views))], seed=1, global_batch=2)
        for views in (groups, list(groups), expected)
    ]
    batches = [
        [
            [(one.position, one.view.sample.index, one.view.box, one.view.flip) for one in entries]
            for entries in islice(order.micro_batches(start), 12)
        ]
        for order in orders
        for start in (0, 5)
    ]
    assert batches[0::2] == [batches[0]] * 3
    assert batches[1::2] == [batches[1]] * 3


def test_a_plan_and_a_recipe_read_tar_files(folder: Path, tmp_path: Path, mini_flux: Path) -> None:
    as_tars(folder, tmp_path / "tars")
    recipe = tmp_path / "recipe.yaml"
    found = []
    for path in ("./folder", "./tars", "./tars/{0..1}.tar", "./tars/*.tar"):
        recipe.write_text(
            f"model: {{family: flux, path: {mini_flux}, max_sequence_length: 24}}\n"
            f"data: {{path: '{path}', resolution: 32, cache_dir: ./cache}}\noutput: {{dir: out}}\n"
        )
        loaded = load_recipe(recipe)
        found.append(planned_pictures(loaded, family_at(mini_flux, Flux)))
    assert found[0].count == 7
    assert found == [found[0]] * 4
    for path in ("./tars/{0..2}.tar", "./tars/{0-1}.tar", "./tars/*.parquet"):
        recipe.write_text(recipe.read_text().replace("./tars/*.tar", path))
        with pytest.raises(RecipeError, match=r"data\.path: got '.*', but "):
            load_recipe(recipe)
        recipe.write_text(recipe.read_text().replace(path, "./tars/*.tar"))
