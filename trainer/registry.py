"""Registries for the choices that a recipe makes by name, such as losses and optimizers: one class per name."""

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Generic, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.wording import unknown_name

# Strict: the string "10" is not accepted as a number, nor 1 as true. An int is still accepted as a float.
SETTINGS = ConfigDict(
    frozen=True,
    extra="forbid",
    strict=True,
    allow_inf_nan=False,
    use_attribute_docstrings=True,
)


def conflict(field: str, message: str) -> PydanticCustomError:
    """Makes the error that a validator comparing several fields raises; `field`, dotted, is the one it points at."""
    return PydanticCustomError("conflict", "{message}", {"field": field, "message": message})


class Choice(BaseModel):
    """Base class of registered choices. The fields are the choice's settings, the docstring its description."""

    model_config = SETTINGS

    name: str

    @abstractmethod
    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Makes the object that the training run uses. Each kind of choice defines arguments and result."""

    def describe(self) -> str:
        """Describes the choice in one line at the start of a run, such as `logit_normal (mean 0.0, std 1.0)`."""
        settings = [f"{key} {value}" for key, value in self if key != "name"]
        return f"{self.name} ({', '.join(settings)})" if settings else self.name


class StatelessChoice(Choice):
    """A choice that needs no state besides its settings, so the run uses the choice itself."""

    def build(self) -> Self:
        """Returns the choice itself."""
        return self


C = TypeVar("C", bound=Choice)


class Registry(Generic[C]):
    """Maps the names of one kind of choice to their classes.

    An instance annotates the recipe's field, as in `loss: Annotated[Loss, LOSSES]`. pydantic then validates the field
    as the union of the registered classes, discriminated by `name`, and the JSON Schema describes the same union.
    Classes must be registered before the recipe's own classes are defined, in a module that the recipe imports.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[C]] = {}

    def register(self, choice: type[C]) -> type[C]:
        """Registers a class, as its decorator, under the single value of its `name: Literal["..."]`."""
        values = get_args(choice.model_fields["name"].annotation)
        assert len(values) == 1, f'{choice}: give it name: Literal["..."]'
        assert values[0] not in self._classes, f"{choice}: there is already a {self.kind} '{values[0]}'"
        self._classes[values[0]] = choice
        return choice

    @property
    def classes(self) -> Mapping[str, type[C]]:
        """The registered classes by name, read-only."""
        return MappingProxyType(self._classes)

    def __getitem__(self, name: str) -> type[C]:
        """Returns the class of a name. Raises RecipeError, with the known names, if the name is not registered."""
        if name not in self._classes:
            raise RecipeError(unknown_name(self.kind, name, self._classes))
        return self._classes[name]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        members = {name: handler.generate_schema(choice) for name, choice in self._classes.items()}
        return core_schema.tagged_union_schema(members, discriminator="name")
