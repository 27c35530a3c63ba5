"""A whole run with masked loss: it learns something else, resumes bitwise identically, and refuses other masks."""

import pytest
from PIL import Image

from halfbyte.trainer.errors import DataError

from runs import results, run_here, write_recipe

MASKS = (
    "path: ./pictures, masked_loss: {source: files, folder: ./masks, outside: 0.1}, crop: random, flip: true"
)


def recipe_in(folder, model):
    folder.mkdir(exist_ok=True)
    recipe = write_recipe(folder, model)
    (folder / "masks").mkdir()
    for picture in (folder / "pictures").glob("*.png"):
        mask = Image.new("L", (80, 72))
        mask.paste(255, (0, 0, 40, 72))
        mask.save(folder / "masks" / picture.name)
    recipe.write_text(recipe.read_text().replace("path: ./pictures", MASKS))
    return recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory, mini_flux):
    recipe = recipe_in(tmp_path_factory.mktemp("masked"), mini_flux)
    run_here(recipe)
    return recipe


def test_it_resumes_bitwise_identically(whole, tmp_path, mini_flux):
    recipe = recipe_in(tmp_path / "again", mini_flux)
    run_here(recipe, "train.steps=2")
    run_here(recipe, resume=True)
    assert results(recipe.parent / "run") == results(whole.parent / "run")


def test_the_mask_decides_what_is_learned(whole):
    run_here(
        whole, "data.masked_loss.source=none", f"output.dir={whole.parent / 'unmasked'}", "train.steps=2"
    )
    rows, masked = (results(whole.parent / name)[0] for name in ("unmasked", "run"))
    assert rows[0] != masked[0]


def test_another_mask_is_refused_at_a_resume(whole):
    mask = whole.parent / "masks" / "picture3.png"
    before = mask.read_bytes()
    Image.new("L", (80, 72), 200).save(mask)
    try:
        with pytest.raises(DataError, match=r"1 mask changed: picture3\.png"):
            run_here(whole, "train.steps=6", resume=True)
    finally:
        mask.write_bytes(before)
