"""Registers the model families by name."""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.wording import unknown_name

if TYPE_CHECKING:
    # Families import diffusers, which takes seconds: a family is imported only when a run uses it.
    from halfbyte.trainer.families.family import Family


class FamilyRegistry:
    """Maps names to model families, given as `module:Class` and imported on first use."""

    def __init__(self, locations: Mapping[str, str]) -> None:
        self._locations = dict(locations)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._locations)

    def __getitem__(self, name: str) -> "type[Family]":
        """Returns the family.

        Raises RecipeError, with the known names and the nearest, if it is not registered.
        """
        if name not in self._locations:
            raise RecipeError(unknown_name("family", name, self._locations))
        module, _, attribute = self._locations[name].partition(":")
        family: type[Family] = getattr(importlib.import_module(module), attribute)
        return family

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.literal_schema(list(self._locations))


FAMILIES = FamilyRegistry(
    {
        "flux": "halfbyte.trainer.families.flux.family:Flux",
        "sd3": "halfbyte.trainer.families.sd3.family:SD3",
    }
)
