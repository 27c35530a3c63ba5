"""Translates the recipe's settings into those of the quantization and block layers."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.load.serialize import CONFIG_FILE, read_quantization_config
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.blocks.fused_block import BlockSettings, Keep
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.offload.activations import HostStore
from halfbyte.trainer.recipe.recipe import Recipe

# train.gradient_checkpointing -> the activations that blocks keep; offload keeps them in host memory.
KEPT: Mapping[str, Keep] = {
    "none": "everything",
    "selective": "attention",
    "full": "inputs",
    "offload": "inputs",
}

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def quant_recipe(recipe: Recipe) -> QuantRecipe | None:
    """Converts the recipe's quant section; None if the base is not to be quantized."""
    if recipe.quant.type == "none":
        return None
    return QuantRecipe(
        quant_type=recipe.quant.type,
        double_quant=recipe.quant.double_quant,
        compute_dtype=DTYPES[recipe.quant.compute_dtype],
        skip=recipe.quant.skip,
        llm_int8_threshold=recipe.quant.llm_int8_threshold,
        scale_search=None if recipe.quant.scale_search == "none" else recipe.quant.scale_search,
    )


def base_recipe(recipe: Recipe, family: Family) -> QuantRecipe | None:
    """Returns the base's quantization: the stored one if it is already quantized, else the recipe's.

    Raises:
        RecipeError: the base is stored in a form that cannot be read.
    """
    asked = quant_recipe(recipe)
    stored = family.denoiser_config.get("quantization_config")
    if stored is None or family.denoiser_folder is None:
        return asked
    try:
        own = read_quantization_config(stored, str(family.denoiser_folder / CONFIG_FILE))
    except ValueError as error:
        raise RecipeError(f"{family.transformer.setting}: {error}") from error
    return replace(own, compute_dtype=DTYPES[recipe.quant.compute_dtype])


def block_settings(recipe: Recipe, attention: str | None) -> BlockSettings:
    """Returns the blocks' settings, with `attention` as the backend."""
    checkpointing = recipe.train.gradient_checkpointing
    return BlockSettings(
        KEPT[checkpointing],
        store=HostStore() if checkpointing == "offload" else None,
        whole=recipe.train.fused_blocks,
        backend=attention,
    )


def block_names(family: Family) -> list[str]:
    """Returns the names of all the transformer's blocks."""
    return [name for kind in family.block_kinds() for name in kind]
