"""Loads T5, the large text encoder, quantized or streamed as the recipe says."""

import logging
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Block

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.load.text_encoder import count_parameters, load_text_encoder, text_encoder_on_meta
from halfbyte.quant.load.transformer import stored_quantization
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.offload.block_stream import BlockStream, keep_on_host, packed_blocks
from halfbyte.trainer.families.offload.copies import copies_to
from halfbyte.trainer.pretrained.component import PIPELINE

log = logging.getLogger(__name__)

T5Quant = Literal["none", "int8", "nf4"]
T5Setting = Literal["auto", "none", "int8", "nf4"]

# Parameters from which `auto` may quantize. T5-XXL has 4.8 billion, 9.5 GB in bf16.
_LARGE = 10**9
# Device memory next to T5's bf16 weights: the other text encoders (1.7 GB for SD3), the activations of a batch of
# captions, and room for the largest weight while it is loaded.
_BESIDES_T5 = 4 * 2**30


def bf16_bytes(folder: Path) -> int:
    """Returns the device memory from which `auto` loads a large T5 in bf16. Raises ValueError for a damaged folder."""
    return 2 * count_parameters(T5EncoderModel, folder) + _BESIDES_T5


def resolve_quant(
    setting: T5Setting, folder: Path, *, free: int | None = None, named_by: str = PIPELINE
) -> T5Quant:
    """Returns how to quantize the T5 in `folder`: `auto` means none where it fits, and else int8.

    A T5 that is already quantized is loaded unchanged, so the result is none, whatever the setting. `auto` takes int8
    because it fits T5-XXL and the other encoders into 8 GB, at a seventh of NF4's error.

    free: the bytes of free device memory; None: unknown, so that `auto` means int8 above a billion parameters.

    Raises:
        RecipeError: the configuration is damaged; the message starts with the setting `named_by`.
    """
    try:
        if stored_quantization(folder) is not None:
            return "none"
        if setting != "auto":
            return setting
        if count_parameters(T5EncoderModel, folder) <= _LARGE:
            return "none"
        return "none" if free is not None and free >= bf16_bytes(folder) else "int8"
    except ValueError as error:
        raise RecipeError(f"{named_by}: {error}") from error


def warn_if_stored_differently(setting: T5Setting, folder: Path) -> None:
    """Logs a warning if the T5 in `folder` is stored in another quantization than the setting asks for."""
    stored = stored_quantization(folder)
    if stored is not None and setting not in ("auto", stored.quant_type):
        log.warning(
            "model.text_encoder_quant: got %s, but %s is already quantized; it is loaded as stored, in %s",
            setting,
            folder,
            stored.describe(),
        )


def t5_block_names(encoder: nn.Module) -> list[str]:
    """Returns the module names of the encoder's blocks."""
    found = (name for name, module in encoder.named_modules() if isinstance(module, T5Block))
    return list(found)


def load_t5(
    folder: Path,
    quant: T5Quant,
    *,
    dtype: torch.dtype,
    device: torch.device,
    stream: bool = False,
    named_by: str = PIPELINE,
) -> nn.Module:
    """Loads the T5 in `folder` to the device, one tensor at a time.

    stream: keeps the blocks in host memory instead and copies each to the device when it computes.

    Raises:
        RecipeError: the files are damaged (the message starts with the setting `named_by`), or `stream` is
            set and no block is quantized.
    """
    recipe = None if quant == "none" else QuantRecipe(quant, compute_dtype=dtype)
    log.info("loading T5 from %s %s", folder, "as stored" if recipe is None else f"in {quant}")
    try:
        names = t5_block_names(text_encoder_on_meta(T5EncoderModel, folder, None, dtype)) if stream else ()
        place = keep_on_host(names) if stream else None
        encoder = load_text_encoder(T5EncoderModel, folder, recipe, dtype=dtype, device=device, place=place)
    except ValueError as error:
        raise RecipeError(f"{named_by}: {error}") from error
    if stream:
        blocks = packed_blocks(encoder, names)
        if not blocks:
            raise RecipeError(
                "model.stream_text_encoder: got true, but T5 is not quantized, and only quantized blocks can"
                " be streamed; expected false, or set model.text_encoder_quant to int8 or nf4"
            )
        BlockStream(blocks, copies_to(device))
    return encoder
