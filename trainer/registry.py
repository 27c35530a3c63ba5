"""The choices a recipe makes by name: one frozen class a choice, found, validated and listed here."""

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from halfbyte.trainer.errors import RecipeError

if TYPE_CHECKING:
    # Families import diffusers, which takes seconds: only those a run uses are imported, when it uses them.
    pass

from halfbyte.trainer.wording import unknown_name

# Strict, so that "10" is no number and 1 is not true; a whole number still passes where a float is asked for.
SETTINGS = ConfigDict(
    frozen=True,
    extra="forbid",
    strict=True,
    allow_inf_nan=False,
    use_attribute_docstrings=True,
)


def conflict(field: str, message: str) -> PydanticCustomError:
    """What a validator that compares fields raises, so that the error points at one of them (dotted)."""
    return PydanticCustomError("conflict", "{message}", {"field": field, "message": message})


class Choice(BaseModel):
    """One named way of doing something. Its fields are its settings, its docstring its description."""

    model_config = SETTINGS

    name: str

    @abstractmethod
    def build(self, *args: Any, **kwargs: Any) -> Any:
        """What the training run works with; each kind of choice says what it takes and gives."""

    def describe(self) -> str:
        """One line for the start of a run, as `logit_normal (mean 0.0, std 1.0)`."""
        settings = [f"{key} {value}" for key, value in self if key != "name"]
        return f"{self.name} ({', '.join(settings)})" if settings else self.name


class StatelessChoice(Choice):
    """A choice that holds nothing but its settings: what it builds is itself."""

    def build(self) -> Self:
        return self


C = TypeVar("C", bound=Choice)


class Registry(Generic[C]):
    """Name -> class for one kind of choice.

    An instance annotates the recipe's field, `loss: Annotated[Loss, LOSSES]`: pydantic then validates the
    field as the union of the registered classes, told apart by `name`, and the JSON Schema says the same.
    A class must be registered before the recipe's own classes are made, in a module the recipe imports.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[C]] = {}

    def register(self, choice: type[C]) -> type[C]:
        """Class decorator: enters the class under the one value its `name: Literal["..."]` allows."""
        values = get_args(choice.model_fields["name"].annotation)
        assert len(values) == 1, f'{choice}: give it name: Literal["..."]'
        assert values[0] not in self._classes, f"{choice}: there is already a {self.kind} '{values[0]}'"
        self._classes[values[0]] = choice
        return choice

    @property
    def classes(self) -> Mapping[str, type[C]]:
        return MappingProxyType(self._classes)

    def __getitem__(self, name: str) -> type[C]:
        """Raises RecipeError, with the known names and the nearest, for a name nobody registered."""
        if name not in self._classes:
            raise RecipeError(unknown_name(self.kind, name, self._classes))
        return self._classes[name]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        members = {name: handler.generate_schema(choice) for name, choice in self._classes.items()}
        return core_schema.tagged_union_schema(members, discriminator="name")
