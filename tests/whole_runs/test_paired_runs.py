"""A run over pairs with a batch size for each resolution: what its batches hold, and that it resumes exactly."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from halfbyte.trainer.data.batches import Batch
from halfbyte.trainer.errors import DataError, RecipeError
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.training.module import DiffusionModule

from runs import results, run_here, write_recipe

DATA = "path: ./pictures, references: {source: folders, folders: [./before, ./wide]}, flip: true, caption_dropout: 0.3"
SETTINGS = (
    "data.resolution=[32, 64]",
    "train.batch_size={32: 3, 64: 1}",
    "train.steps=4",
    "validation.held_out=1",
    "validation.every=2",
    "sample.prompts=[]",
    "output.export_base=false",
)


@pytest.fixture(scope="module", autouse=True)
def takes_references() -> Iterator[None]:
    """Lets the family flux take two references; its denoiser does not see them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flux, "max_references", 2)
        yield


def recipe_in(folder: Path, model: Path) -> Path:
    folder.mkdir(exist_ok=True)
    recipe = write_recipe(folder, model)
    for name, size in (("before", (80, 72)), ("wide", (160, 40))):
        (folder / name).mkdir()
        for number, picture in enumerate(sorted((folder / "pictures").glob("*.png"))):
            Image.new("RGB", size, (40 * number, 10, 10)).save(folder / name / picture.name)
    recipe.write_text(recipe.read_text().replace("path: ./pictures, resolution: 64", DATA))
    return recipe


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches that were trained on, in order."""
    batches: list[Batch] = []
    loss = DiffusionModule.loss

    def observed(self: DiffusionModule, batch: Batch) -> object:
        batches.append(batch)
        return loss(self, batch)

    monkeypatch.setattr(DiffusionModule, "loss", observed)
    return batches


def test_it_reads_pairs_and_resumes_bitwise_identically(
    tmp_path: Path, mini_flux: Path, seen: list[Batch]
) -> None:
    whole = run_here(recipe_in(tmp_path / "whole", mini_flux), *SETTINGS)
    batches = [*seen]
    assert len(batches) == 8
    small = [batch for batch in batches if len(batch.positions) == 3]
    assert 0 < len(small) < 8
    for batch in batches:
        before, wide = batch.references
        count = len(batch.positions)
        side = 4 if count == 3 else 8
        assert batch.latent_mean.shape == before.shape == (count, 16, side, side)
        assert wide.shape[:2] == (count, 16)
        assert wide.shape[3] > wide.shape[2]
    # Each step has two micro-batches; every sample of a step has the same weight.
    for one, other in zip(batches[::2], batches[1::2], strict=True):
        assert one.share / len(one.positions) == pytest.approx(other.share / len(other.positions))
        assert one.share + other.share == pytest.approx(2)
    seen.clear()
    recipe = recipe_in(tmp_path / "again", mini_flux)
    run_here(recipe, *SETTINGS, "train.steps=2")
    again = run_here(recipe, *SETTINGS, resume=True)
    assert [batch.positions for batch in seen] == [batch.positions for batch in batches]
    assert results(again) == results(whole)
    # Other references and other batch sizes are refused.
    with pytest.raises(RecipeError, match="samples per optimizer step"):
        run_here(recipe, *SETTINGS, "train.batch_size=1", "train.steps=8", resume=True)
    Image.new("RGB", (80, 72), "white").save(recipe.parent / "before" / "picture3.png")
    with pytest.raises(DataError, match=r"1 image with other references: picture3\.png"):
        run_here(recipe, *SETTINGS, "train.steps=8", resume=True)
