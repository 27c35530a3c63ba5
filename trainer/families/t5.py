"""The large text encoder, T5: how it is held while captions are encoded."""

import logging
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import T5EncoderModel

from halfbyte.quant.convert import QuantRecipe
from halfbyte.quant.load import read_config
from halfbyte.quant.load_text_encoder import count_parameters, load_text_encoder
from halfbyte.trainer.errors import RecipeError

log = logging.getLogger(__name__)

T5Quant = Literal["none", "int8", "nf4"]
T5Setting = Literal["auto", "none", "int8", "nf4"]

# T5-XXL has 4.8 billion, 9.5 GB in bf16.
_LARGE = 10**9


def settle(setting: T5Setting, folder: Path) -> T5Quant:
    """How the T5 in `folder` is held: `auto` is int8 for more than a billion parameters, none for fewer.

    A T5 that is stored packed is loaded as it is, which is none as well.

    int8 because it fits T5-XXL and the other encoders into 8 GB, at a seventh of NF4's error. The model decides and
    not the card at hand, so that a recipe trains on the same embeddings everywhere. Raises RecipeError.
    """
    if setting != "auto":
        return setting
    try:
        if "quantization_config" in read_config(folder):
            return "none"
        return "int8" if count_parameters(T5EncoderModel, folder) > _LARGE else "none"
    except ValueError as error:
        raise RecipeError(f"model.path: {error}") from error


def load_t5(folder: Path, quant: T5Quant, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The T5 in `folder`, streamed to the device. Raises RecipeError for damaged files."""
    recipe = None if quant == "none" else QuantRecipe(quant, compute_dtype=dtype)
    log.info("loading T5 from %s, held %s", folder, "as it is stored" if recipe is None else f"in {quant}")
    try:
        return load_text_encoder(T5EncoderModel, folder, recipe, dtype=dtype, device=device)
    except ValueError as error:
        raise RecipeError(f"model.path: {error}") from error
