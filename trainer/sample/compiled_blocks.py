"""torch.compile for a transformer's blocks alone: all blocks of a kind share what is compiled for the first."""

import torch
from torch import nn

from halfbyte.trainer.families.family import Family

# Kinds of block, layers with an adapter and without, adapters that are off: each is compiled by itself. torch stops at
# eight, and with fullgraph that is an error.
_VARIANTS = 64


def compile_blocks(denoiser: nn.Module, family: Family) -> None:
    """Has every block compiled as one graph when it is first called, as diffusers' `compile_repeated_blocks` does.

    That method needs a list of classes which diffusers' SD3 has not, so the family's own list is used. The model
    around the blocks stays as it is: compiled, it rounds the timestep otherwise.
    """
    torch._dynamo.config.recompile_limit = max(_VARIANTS, torch._dynamo.config.recompile_limit)
    for kind in family.block_kinds():
        for block in kind:
            denoiser.get_submodule(block).compile(fullgraph=True)
