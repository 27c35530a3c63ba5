"""Tests of reading several data sets: what is held out, what each set gives, and what a resumed run notices."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from halfbyte.trainer.data.read_sets import (
    ReadData,
    held_out_views,
    read_data,
    split_data,
    summaries,
    training_views,
)
from halfbyte.trainer.data.record import recorded, require_same, write_record
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.recipe.recipe import Recipe

from counting_encoders import write_pictures
from steps import family_at

TEXT = """\
model: {{family: flux, path: owner/name}}
data:
  resolution: [32, 64]
  sets:
    - {{path: ./dog, repeats: 3}}
    - {{path: ./dogs, kind: regularization, loss_weight: 0.5, resolution: 32, flip: true}}
validation: {{held_out: {held_out}}}
output: {{dir: out}}
"""


def recipe_in(folder: Path, held_out: int = 0, *, same: bool = False) -> Recipe:
    """Writes two sets of four images of other contents (or the same), and their recipe."""
    write_pictures(folder / "dog")
    write_pictures(folder / "dogs")
    if not same:
        for number, picture in enumerate(sorted((folder / "dogs").glob("*.png"))):
            picture.write_bytes(picture.read_bytes() + bytes([number]))  # decoders ignore what follows
    (folder / "recipe.yaml").write_text(TEXT.format(held_out=held_out))
    return load_recipe(folder / "recipe.yaml")


def read(recipe: Recipe) -> ReadData:
    return read_data(recipe, is_decoded=lambda sha256: False)


def test_each_set_gives_its_images_at_its_own_sizes(tmp_path: Path, mini_flux: Path) -> None:
    recipe, family = recipe_in(tmp_path), family_at(mini_flux, Flux)
    data = read(recipe)
    ordered = training_views(data, family, seed=0)
    first, second = summaries(data, ordered)
    assert [len(one.samples) for one in data.sets] == [4, 4]
    assert (first.images, second.images) == (4, 4)
    # The 64 x 64 image is trained at 64 as well; the others (64 x 48) would be enlarged.
    assert first.sizes == {32: [(32, 32)], 64: [(64, 64)]}
    assert second.sizes == {32: [(32, 32)]}
    assert (first.uses, second.uses) == (15, 4)
    assert (first.share, second.share) == (15 / 19, 4 / 19)
    assert (first.views, second.views) == (5, 8)
    assert first.cropped == pytest.approx((0.25 * 3) / 5)
    assert (first.enlarged, second.enlarged) == (0, 0)


def test_only_images_of_the_kind_train_are_held_out(tmp_path: Path, mini_flux: Path) -> None:
    recipe = recipe_in(tmp_path, held_out=3)
    data = read(recipe)
    assert {sample.data_set for sample in data.held_out_samples} == {0}
    assert [len(one.samples) for one in data.sets] == [1, 4]
    views = held_out_views(data, family_at(mini_flux, Flux), seed=0)
    assert [view.sample for view in views] == list(data.held_out_samples)
    assert not any(view.flip for view in views)


def test_a_held_out_image_is_in_no_other_set(tmp_path: Path) -> None:
    data = read(recipe_in(tmp_path, held_out=1, same=True))
    assert data.held_out_count == 1
    assert [len(one.samples) for one in data.sets] == [3, 3]
    trained = {sample.sha256 for sample in data.samples()}
    assert next(data.held_out_samples).sha256 not in trained


def test_a_set_of_which_everything_is_held_out_is_refused(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, held_out=1)
    samples = read(recipe_in_place(recipe)).samples()
    first = min((sample for sample in samples if sample.data_set == 0), key=lambda sample: sample.sha256)
    with pytest.raises(DataError, match=r"data\.sets\[0\]: all images of .*dog are held out"):
        split_data(recipe, [replace(one, samples=[]) for one in read(recipe_in_place(recipe)).sets], [first])


def recipe_in_place(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"validation": recipe.validation.model_copy(update={"held_out": 0})})


def test_a_resume_notices_an_image_that_moved_to_another_set(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)

    def record(data: ReadData):
        return [
            one
            for number, given in enumerate(recipe.data.resolved_sets)
            for one in recorded(data.sets[number].samples, given.path, held_out=False)
        ]

    before = record(read(recipe))
    write_record(tmp_path / "data.jsonl.gz", before)
    require_same(tmp_path / "data.jsonl.gz", before)
    for suffix in (".png", ".txt"):  # the last of the first set becomes the first of the second
        shutil.move(tmp_path / "dog" / f"d{suffix}", tmp_path / "dogs" / f"0{suffix}")
    after = record(read(recipe))
    assert [one.image for one in after] == [one.image for one in before]
    with pytest.raises(
        DataError, match=r"1 image missing: d\.png(.|\n)*1 image new: 0\.png of data\.sets\[1\]"
    ):
        require_same(tmp_path / "data.jsonl.gz", after)
