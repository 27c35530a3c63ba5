"""Refuses configurations that ask for absurdly large models, before a model is built from them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MOST_LAYERS = 1000
LARGEST_SIZE = 2**24


def refuse_oversized(config: Mapping[str, Any], where: Path, *, most_layers: int = MOST_LAYERS) -> None:
    """Checks all integers of a configuration.

    most_layers: the limit for numbers of layers and blocks, for example the number of tensors in the model's
        files, as every layer has a tensor.

    Raises ValueError, beginning with `where`, for a number of layers or a size above its limit.
    """
    for key, value in _integers(config):
        counts_layers = "layers" in key or "blocks" in key
        limit = most_layers if counts_layers else LARGEST_SIZE
        if abs(value) > limit:
            why = "its files do not have the weights of so many" if counts_layers else "no model is so large"
            raise ValueError(f"{where}: {key} is {_shown(value)}, but accepted are at most {limit}: {why}")


def _shown(value: int) -> str:
    """Returns a number, or for a huge one its size: Python refuses to print numbers of thousands of digits."""
    return str(value) if abs(value) < 10**24 else f"a number of {value.bit_length()} bits"


def _integers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yields all integers with their keys, at any depth; numbers of a list have the list's key."""
    left: list[tuple[str, Any]] = [(str(key), value) for key, value in config.items()]
    while left:
        key, value = left.pop()
        if isinstance(value, Mapping):
            left += [(str(inner), item) for inner, item in value.items()]
        elif isinstance(value, list):
            left += [(key, item) for item in value]
        elif isinstance(value, int) and not isinstance(value, bool):
            yield key, value
