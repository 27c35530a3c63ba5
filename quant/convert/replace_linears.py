"""Which linear layers of a model are quantized: the recipe, and diffusers' own rule for what it skips."""

import logging

from torch import nn

from halfbyte.quant.convert.recipe import (
    QuantRecipe,
)
from halfbyte.quant.convert.skip_list import check_skip_list, is_skipped, kept_in_fp32, linear_layers
from halfbyte.quant.layers.quantized_layer import QuantizedLayer

log = logging.getLogger(__name__)


def convert(model: nn.Module, recipe: QuantRecipe, *, check_skip: bool = True) -> tuple[str, ...]:
    """Replace the linear layers of `model` in place by quantized ones; returns their paths.

    Layers with values are quantized where they are; layers on meta wait for theirs. With `check_skip` a skip
    list is refused (SkipListError) where an entry matches nothing, and warned about where it matches more than it
    seems to say; off, for lists that a checkpoint brings along. Raises ValueError as well where adapters are
    already on the model, or no layer is left to quantize.
    """
    model_name = type(model).__name__
    if getattr(model, "peft_config", None):
        raise ValueError(f"{model_name}: has adapters already; quantize the base first, then add them")
    if check_skip:
        check_skip_list(model, recipe.skip)
    skip = (*recipe.skip, *kept_in_fp32(model))
    replaced = []
    for path, linear in list(linear_layers(model)):
        if isinstance(linear, QuantizedLayer) or is_skipped(path, skip):
            continue
        model.set_submodule(path, recipe.quantized(linear, f"{path}.weight"))
        replaced.append(path)
    if not replaced:
        raise ValueError(
            f"{model_name}: no linear layer to quantize; it has none, or skip={list(skip)} names them all"
        )
    return tuple(replaced)
