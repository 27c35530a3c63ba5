"""A recipe of three lines, and what is wrong with others."""

from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.recipe.load import load_recipe

SMALL = """\
model: {family: flux, path: owner/name}
data: {path: ./pictures}
output: {dir: out}
"""

Write = Callable[[str], Path]  # the fixture `write`: recipe.yaml with this text


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the error, without the folder of the recipe."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()
