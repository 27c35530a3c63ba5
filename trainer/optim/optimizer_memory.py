"""What an optimizer takes on the device beside adapters and gradients."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Shapes = Sequence[tuple[int, ...]]  # of the trained parameters

FP32 = 4  # bytes


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes on the device."""

    state: int
    """Kept from step to step."""
    working: int
    """Taken within a step and given back."""


def numbers(shapes: Shapes) -> int:
    """How many parameters there are."""
    return sum(math.prod(shape) for shape in shapes)


def in_blocks(shapes: Shapes, block: int) -> int:
    """How many blocks hold them, each parameter's padded to whole ones."""
    return sum(-(-math.prod(shape) // block) for shape in shapes)


def factored(shapes: Shapes) -> tuple[int, int]:
    """Parameters stacked by shape: the numbers in the rows' and columns' means, each of a vector's, and those in the
    largest stack."""
    means, largest = 0, 0
    for shape, count in Counter(shapes).items():
        *outer, rows, columns = (count, *shape) if len(shape) > 1 else (count, *shape, 0)
        means += math.prod(outer) * (rows + columns)
        largest = max(largest, count * math.prod(shape))
    return means, largest
