"""Checks the types of configuration values that the trainer itself reads; files of models can hold anything."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.trainer.errors import RecipeError


@dataclass(frozen=True)
class Kind:
    """A type of configuration value."""

    described: str  # as in "expected ..."
    accepts: Callable[[Any], bool]
    required: bool = True


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_integer(value) and value > 0


def _is_number(value: Any) -> bool:
    return (_is_integer(value) and abs(value) < 2**53) or (isinstance(value, float) and math.isfinite(value))


COUNT = Kind("a positive integer", _is_positive)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a number", _is_number)
FACTOR = Kind("a number other than 0", lambda value: _is_number(value) and value != 0)
WIDTHS = Kind(
    "a list of up to 8 positive integers",
    lambda value: isinstance(value, list) and 0 < len(value) <= 8 and all(map(_is_positive, value)),
)
OPTIONAL_COUNT = Kind("a positive integer or null", lambda v: v is None or _is_positive(v), required=False)
OPTIONAL_NUMBER = Kind("a number or null", lambda v: v is None or _is_number(v), required=False)
OPTIONAL_FLAG = Kind("true or false", lambda value: isinstance(value, bool), required=False)
OPTIONAL_WIDTHS = Kind(WIDTHS.described, WIDTHS.accepts, required=False)
OPTIONAL_NUMBERS = Kind(
    "a list of layers' numbers",
    lambda v: v is None or (isinstance(v, list) and all(_is_integer(n) and n >= 0 for n in v)),
    required=False,
)


def require_fields(config: Mapping[str, Any], where: str, kinds: Mapping[str, Kind]) -> None:
    """Checks the values of a configuration.

    Raises:
        RecipeError: A value is missing or of another type. The message begins with `where`.
    """
    for key, kind in kinds.items():
        if key not in config:
            if kind.required:
                raise RecipeError(
                    f"{where}: {key} is missing, expected {kind.described}; download the model again"
                )
        elif not kind.accepts(config[key]):
            raise RecipeError(
                f"{where}: {key} is {config[key]!r:.80}, expected {kind.described}; download the model again"
            )
