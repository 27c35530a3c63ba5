"""A minimal recipe for tests, and a helper that returns the problems of a recipe."""

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

Write = Callable[[str], Path]  # type of the fixture `write`, which writes recipe.yaml with the given text


def problems(path: Path, *overrides: str) -> list[str]:
    """Loads a recipe that must fail. Returns the lines of the error, without the recipe's folder."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()
