"""Tests of finding masks: next to the images, in a folder and in the images; and of every mask that cannot be used."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from halfbyte.trainer.data.cache.masks import MaskCache
from halfbyte.trainer.data.read_sets import ReadData, read_data
from halfbyte.trainer.data.record import recorded, require_same, write_record
from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.data.views.buckets import Cropping, views_of
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.recipe.load import load_recipe

from counting_encoders import change_byte, move_to_files, write_pictures


def left_half(size: tuple[int, int], mode: str = "L") -> Image.Image:
    mask = Image.new(mode, size)
    mask.paste("white", (0, 0, size[0] // 2, size[1]))
    return mask


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures")


def masked(folder: Path, masked_loss: str) -> list[Sample]:
    return read_in(folder, masked_loss).samples()


def read_in(folder: Path, masked_loss: str) -> ReadData:
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "model: {family: flux, path: owner/name}\n"
        f"data: {{path: ./pictures, resolution: 32, masked_loss: {masked_loss}}}\noutput: {{dir: out}}\n"
    )
    return read_data(load_recipe(recipe), is_decoded=lambda _: False)


def write_masks(pictures: Path, folder: Path, mark: str) -> None:
    folder.mkdir(exist_ok=True)
    for picture in sorted(pictures.glob("?.png")):
        with Image.open(picture) as image:
            left_half(image.size).save(folder / f"{picture.stem}{mark}.png")


@pytest.mark.parametrize(
    ("folder", "mark", "setting"),
    [
        ("pictures", ".mask", "{source: files}"),
        ("masks", "", "{source: files, folder: ./masks}"),
        ("masks", ".mask", "{source: files, folder: ./masks}"),
        ("pictures/masks", "", "{source: files, folder: ./pictures/masks}"),
    ],
)
def test_masks_are_found_and_never_trained(pictures: Path, folder: str, mark: str, setting: str) -> None:
    write_masks(pictures, pictures.parent / folder, mark)
    samples = masked(pictures.parent, setting)
    assert [sample.path.name for sample in samples] == ["a.png", "b.png", "c.png", "d.png"]
    assert [sample.mask.path.name for sample in samples] == [f"{name}{mark}.png" for name in "abcd"]


def test_a_mask_that_is_used_is_not_left_out(pictures: Path) -> None:
    write_masks(pictures, pictures, ".mask")
    (pictures / "other.mask.png").write_bytes((pictures / "a.mask.png").read_bytes())
    left_out = [
        {picture.name for picture in read_in(pictures.parent, setting).sets[0].left_out.reasons}
        for setting in ("{source: none}", "{source: files}")
    ]
    assert left_out == [{f"{name}.mask.png" for name in ("a", "b", "c", "d", "other")}, {"other.mask.png"}]


def test_mask_files_are_not_trained_without_masks_either(pictures: Path) -> None:
    write_masks(pictures, pictures, ".mask")
    samples = masked(pictures.parent, "{source: none}")
    assert [sample.path.name for sample in samples] == ["a.png", "b.png", "c.png", "d.png"]
    assert all(sample.mask is None for sample in samples)


def test_transparency_is_a_mask(pictures: Path) -> None:
    for picture in pictures.glob("?.png"):
        with Image.open(picture) as image:
            image.putalpha(left_half(image.size))
            image.save(picture)
    samples = masked(pictures.parent, "{source: alpha}")
    assert all(sample.mask.path is None for sample in samples)
    assert all(sample.mask.sha256 == sample.sha256 for sample in samples)


class TestUnusable:
    @pytest.fixture(autouse=True)
    def masks(self, pictures: Path) -> None:
        write_masks(pictures, pictures, ".mask")

    def problems(self, pictures: Path, masked_loss: str = "{source: files}") -> list[str]:
        with pytest.raises(DataError) as caught:
            masked(pictures.parent, masked_loss)
        return str(caught.value).replace(f"{pictures}/", "").splitlines()

    def test_one_that_is_missing(self, pictures: Path) -> None:
        (pictures / "b.mask.png").unlink()
        (line,) = self.problems(pictures)
        assert line.startswith("b.png: has no mask; expected b.mask.png next to it")
        samples = masked(pictures.parent, "{source: files, missing: whole}")
        assert [sample.mask is None for sample in samples] == [False, True, False, False]

    def test_an_image_without_transparency(self, pictures: Path) -> None:
        lines = self.problems(pictures, "{source: alpha}")
        assert [line.partition(":")[0] for line in lines] == ["a.png", "b.png", "c.png", "d.png"]
        assert "transparency channel" in lines[0]

    def test_one_that_is_black(self, pictures: Path) -> None:
        Image.new("L", (64, 48)).save(pictures / "a.mask.png")
        (line,) = self.problems(pictures)
        assert line.startswith("a.mask.png: is black everywhere")

    def test_an_image_that_is_transparent_everywhere(self, pictures: Path) -> None:
        Image.new("RGBA", (64, 48), (9, 9, 9, 0)).save(pictures / "a.png")
        lines = self.problems(pictures, "{source: alpha, missing: whole}")
        assert [line.partition(",")[0] for line in lines] == ["a.png: is transparent everywhere"]

    def test_one_of_other_proportions(self, pictures: Path) -> None:
        Image.new("L", (48, 64), 255).save(pictures / "a.mask.png")
        (line,) = self.problems(pictures)
        assert line.startswith("a.mask.png: has 48x64 pixels, but its image a.png 64x48")

    def test_one_of_another_size_is_accepted(self, pictures: Path) -> None:
        left_half((640, 480)).save(pictures / "a.mask.png")
        assert len(masked(pictures.parent, "{source: files}")) == 4

    @pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
    def test_one_that_cannot_be_decoded(self, pictures: Path, content: bytes) -> None:
        (pictures / "c.mask.png").write_bytes(content)
        (line,) = self.problems(pictures)
        assert line.startswith("c.mask.png: cannot be decoded: ")

    def test_a_link_out_of_the_folder(self, pictures: Path, tmp_path: Path) -> None:
        left_half((64, 48)).save(tmp_path / "outside.png")
        (pictures / "a.mask.png").unlink()
        (pictures / "a.mask.png").symlink_to(tmp_path / "outside.png")
        assert "a.mask.png: is a symbolic link to a file outside" in self.problems(pictures)[0]

    def test_all_of_many_are_listed(self, pictures: Path) -> None:
        for name in "abd":
            (pictures / f"{name}.mask.png").write_bytes(b"damaged")
        assert [line[:10] for line in self.problems(pictures)] == [f"{name}.mask.png" for name in "abd"]


class TestCache:
    def test_entries_are_those_of_the_mask_and_its_crop(self, pictures: Path, tmp_path: Path) -> None:
        write_masks(pictures, pictures, ".mask")
        samples = masked(pictures.parent, "{source: files}")
        views = [group[0] for group in views_of(samples, [Cropping(32, 16, aspect_buckets=False)], 0)]
        cache = MaskCache(tmp_path / "cache", 8)
        assert cache.add_missing(views) == []
        for view in views:
            assert cache.read(view).equal(torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 4))
        keys = [cache.key(view) for view in views]
        cache.add_missing(views)
        assert len(list(cache.shards.glob("*.shard"))) == 1, "no mask is made again"

        left_half((32, 24)).save(pictures / "a.mask.png")
        changed = masked(pictures.parent, "{source: files}")
        again = [group[0] for group in views_of(changed, [Cropping(32, 16, aspect_buckets=False)], 0)]
        assert [cache.key(view) == key for view, key in zip(again, keys, strict=True)] == [
            False,
            True,
            True,
            True,
        ]

    def test_a_damaged_entry_is_made_again(self, pictures: Path, tmp_path: Path) -> None:
        write_masks(pictures, pictures, ".mask")
        (view, *_) = [
            g[0] for g in views_of(masked(pictures.parent, "{source: files}"), [Cropping(32, 16)], 0)
        ]
        cache = MaskCache(tmp_path / "cache", 8)
        cache.add_missing([view])
        change_byte(cache, view)
        with pytest.raises(DataError, match="checksum"):
            cache.read(view)
        cache.add_missing([view])
        assert cache.read(view).any()

    def test_masks_of_older_versions_are_read(self, pictures: Path, tmp_path: Path) -> None:
        write_masks(pictures, pictures, ".mask")
        samples = masked(pictures.parent, "{source: files}")
        (view, *_) = [group[0] for group in views_of(samples, [Cropping(32, 16)], 0)]
        cache = MaskCache(tmp_path / "cache", 8)
        cache.add_missing([view])
        before = cache.read(view)
        move_to_files(cache, [view])
        cache = MaskCache(tmp_path / "cache", 8)
        cache.add_missing([view])
        assert not cache.shards.exists()
        assert cache.read(view).equal(before)

    def test_a_crop_that_misses_the_mask_is_reported(self, pictures: Path, tmp_path: Path) -> None:
        for name in "abcd":
            with Image.open(pictures / f"{name}.png") as image:
                mask = Image.new("L", image.size)
            mask.putpixel((0, 0), 255)  # cut off by the center crop of all but the square one
            mask.save(pictures / f"{name}.mask.png")
        samples = masked(pictures.parent, "{source: files}")
        views = [g[0] for g in views_of(samples, [Cropping(32, 16, aspect_buckets=False)], 0)]
        black = MaskCache(tmp_path / "cache", 8).add_missing(views)
        assert [view.sample.path.name for view in black] == ["a.png", "b.png", "c.png"]

    def test_a_mask_that_changes_during_the_start_is_noticed(self, pictures: Path, tmp_path: Path) -> None:
        write_masks(pictures, pictures, ".mask")
        (view, *_) = [
            g[0] for g in views_of(masked(pictures.parent, "{source: files}"), [Cropping(32, 16)], 0)
        ]
        left_half((6, 8)).save(view.sample.mask.path)
        with pytest.raises(DataError, match=r"a\.mask\.png: changed since the run was started"):
            MaskCache(tmp_path / "cache", 8).add_missing([view])


def test_a_resume_notices_another_mask(pictures: Path, tmp_path: Path) -> None:
    write_masks(pictures, pictures, ".mask")
    before = recorded(masked(pictures.parent, "{source: files}"), pictures, held_out=False)
    write_record(tmp_path / "record.gz", before)
    require_same(tmp_path / "record.gz", before)
    left_half((6, 8)).save(pictures / "c.mask.png")
    after = recorded(masked(pictures.parent, "{source: files}"), pictures, held_out=False)
    with pytest.raises(DataError, match=r"1 mask changed: c\.png"):
        require_same(tmp_path / "record.gz", after)
