"""Maps the layer names of a model's authors to diffusers, which renames layers and splits some into parts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OriginalName:
    """A layer by its name in the authors' files, which ComfyUI and kohya's scripts also use."""

    name: str
    parts: tuple[str, ...]  # the diffusers modules whose outputs it stacks, in order of rows
    rows: tuple[int, ...] = ()  # the number of outputs of each part, if there are several
    swapped: bool = False  # diffusers stores its two halves, shift and scale, in the opposite order
    leaf: str = "weight"  # the name of its tensor in the authors' files


def qkv(name: str, attention: str, kinds: Sequence[str], width: int) -> OriginalName:
    """Returns the fused layer of queries, keys and values, each `width` rows."""
    return OriginalName(name, tuple(f"{attention}.{kind}" for kind in kinds), (width,) * 3)


def swap_halves(rows: Tensor) -> Tensor:
    """Swaps the two halves of the rows: (shift, scale) to (scale, shift), or back."""
    first, second = rows.chunk(2)
    return torch.cat((second, first))
