"""Tests of registered choices: adding one takes one class, and loading recipes imports no model code."""

import subprocess
import sys

import pytest

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.objective.losses import LOSSES, Huber
from halfbyte.trainer.registry import Registry

from small_recipe import SMALL, Write


def test_a_new_loss_is_one_registered_class(write: Write) -> None:
    program = """
import sys
from typing import Literal
from pydantic import Field
from halfbyte.trainer.objective.losses import LOSSES, Loss

@LOSSES.register
class Quartic(Loss):
    "The fourth power of the error."
    name: Literal["quartic"]
    scale: float = Field(default=1.0, gt=0)

    def elementwise(self, prediction, target):
        return self.scale * (prediction - target) ** 4

from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.recipe.schema import json_schema_text
loss = load_recipe(sys.argv[1], ["objective.loss={name: quartic, scale: 2}"]).objective.loss
assert type(loss) is Quartic and loss.scale == 2, loss
assert '"quartic"' in json_schema_text()
try:
    load_recipe(sys.argv[1], ["objective.loss={name: quartic, scale: 0}"])
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(write(SMALL))], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert "scale: got 0," in done.stdout
    assert "positive number" in done.stdout


def test_loading_a_recipe_imports_no_model_code(write: Write) -> None:
    program = (
        "import sys; from halfbyte.trainer.recipe.load import load_recipe; load_recipe(sys.argv[1]);"
        "print([m for m in ('diffusers', 'transformers', 'lightning', 'peft', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(write(SMALL))], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", FAMILIES.names)
def test_each_family_is_in_its_own_package(name: str) -> None:
    assert FAMILIES[name].__module__ == f"halfbyte.trainer.families.{name}.family"


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"family 'fluxx'.*flux or sd3.*did you mean 'flux'"):
        FAMILIES["fluxx"]
    with pytest.raises(RecipeError, match=r"loss 'quartic'.*mse, huber or l1$"):
        LOSSES["quartic"]


def test_a_name_is_registered_once() -> None:
    registry: Registry[Huber] = Registry("loss")
    registry.register(Huber)
    with pytest.raises(AssertionError, match="loss 'huber'"):
        registry.register(Huber)
