"""Replaces a model's linear layers by quantized ones, except those that the skip list matches."""

import logging

from torch import nn

from halfbyte.quant.convert.recipe import (
    QuantRecipe,
)
from halfbyte.quant.convert.skip_list import check_skip_list, is_skipped, kept_in_fp32, linear_layers
from halfbyte.quant.layers.quantized_layer import QuantizedLayer

log = logging.getLogger(__name__)


def convert(model: nn.Module, recipe: QuantRecipe, *, check_skip: bool = True) -> tuple[str, ...]:
    """Replaces the linear layers of `model` in place by quantized ones; returns their paths.

    A layer with values is quantized on its own device. A layer on meta becomes an empty quantized layer,
    which gets its weight later. `check_skip` checks the recipe's skip list against the model; turn it off for
    a list that comes with a checkpoint.

    Raises SkipListError where an entry of a checked list matches nothing, and ValueError where the model
    already has adapters or no layer is left to quantize. Warns where an entry matches layers outside its
    module.
    """
    model_name = type(model).__name__
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"{model_name}: already has adapters; quantize the base first, then add the adapters"
        )
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
            f"{model_name}: no linear layer to quantize; the model has none, or skip={list(skip)} matches them all"
        )
    return tuple(replaced)
