"""Tests of images that are not for training: masks, thumbnails, deleted files."""

from pathlib import Path

import pytest
from PIL import Image

from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.left_out import LeftOut
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.errors import DataError

WORD = CaptionStyle("ohwx")


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 16), "red").save(path)
    return path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.mask.png", "masks"),
        ("a-masklabel.png", "masks"),
        ("a_mask.png", "masks"),
        ("masks/a.png", "masks"),
        ("a-condlabel.png", "control images"),
        ("control/a.jpg", "control images"),
        ("a.ref0.png", "reference images"),
        ("@eaDir/a.png/SYNOPHOTO_THUMB_M.png", "thumbnails"),
        ("__MACOSX/a.png", "thumbnails"),
        ("#recycle/b.png", "deleted files"),
        ("$RECYCLE.BIN/S-1-5-21/$R1.png", "deleted files"),
        (".Trash-1000/files/b.png", "deleted files"),
        ("_latent_cache/b.png", "caches"),
    ],
)
def test_it_is_left_out_with_a_reason(tmp_path: Path, name: str, reason: str) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / name)
    left_out = LeftOut()
    assert [sample.path.name for sample in read_samples(tmp_path, WORD, left_out=left_out)] == ["a.png"]
    assert left_out.reasons == {tmp_path / name: reason}
    assert left_out.describe(tmp_path) == f"{reason}: 1 ({name})"


@pytest.mark.parametrize("name", ["Thumbs.db", "a.png~", "a.png.tmp", "b.tmp", "._a.png", "a_flux.npz"])
def test_files_that_are_no_images_do_not_matter(tmp_path: Path, name: str) -> None:
    data = picture(tmp_path / "a.png").read_bytes()
    (tmp_path / name).write_bytes(data)
    assert [sample.path.name for sample in read_samples(tmp_path, WORD)] == ["a.png"]


def test_an_image_that_only_sounds_like_a_mask_is_trained(tmp_path: Path) -> None:
    names = ["gas_mask.png", "dog.png", "dog_mask.png", "masks/carnival.png", "control.png"]
    for name in names:
        picture(tmp_path / name)
    (tmp_path / "dog_mask.txt").write_text("a dog with a mask")
    assert sorted(
        str(sample.path.relative_to(tmp_path)) for sample in read_samples(tmp_path, WORD)
    ) == sorted(names)


def test_a_row_of_a_table_makes_a_doubtful_name_an_image(tmp_path: Path) -> None:
    for name in ("dog.png", "dog_mask.png"):
        picture(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,text\ndog.png,a dog\ndog_mask.png,a dog with a mask\n")
    assert len(read_samples(tmp_path)) == 2


def test_a_folder_of_masks_is_no_data_set(tmp_path: Path) -> None:
    picture(tmp_path / "a.mask.png")
    with pytest.raises(DataError, match=r"all images are left out: masks: 1 \(a\.mask\.png\)"):
        read_samples(tmp_path, WORD)


def test_the_reasons_are_counted(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "a.mask.png", "b.mask.png", "@eaDir/x.png"):
        picture(tmp_path / name)
    left_out = LeftOut()
    read_samples(tmp_path, WORD, left_out=left_out)
    assert left_out.describe(tmp_path) == "thumbnails: 1 (@eaDir/x.png), masks: 2 (a.mask.png, ...)"
