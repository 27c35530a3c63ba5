"""How the authors of a model name its layers, where diffusers names them otherwise or holds them in parts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OriginalName:
    """A layer as in the authors' own files, which ComfyUI and kohya's scripts keep to."""

    name: str
    parts: tuple[str, ...]  # the modules of diffusers whose outputs it stacks, the first on top
    rows: tuple[int, ...] = ()  # outputs of each part, where there are several
    swapped: bool = False  # its two halves, shift and scale, are the other way round in diffusers
    leaf: str = "weight"  # what its tensor is called there


def qkv(name: str, attention: str, kinds: Sequence[str], width: int) -> OriginalName:
    """Queries, keys and values as one layer."""
    return OriginalName(name, tuple(f"{attention}.{kind}" for kind in kinds), (width,) * 3)


def swap_halves(rows: Tensor) -> Tensor:
    """Shift above scale -> scale above shift, and back."""
    first, second = rows.chunk(2)
    return torch.cat((second, first))
