"""The large text encoder, T5: how it is held while captions are encoded."""

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

# T5-XXL has 4.8 billion, 9.5 GB in bf16.
_LARGE = 10**9


def resolve_quant(setting: T5Setting, folder: Path, *, named_by: str = PIPELINE) -> T5Quant:
    """How the T5 in `folder` is held: `auto` is int8 for more than a billion parameters, none for fewer.

    A T5 that is stored packed is loaded as it is, which is none as well, whatever the setting.

    int8 because it fits T5-XXL and the other encoders into 8 GB, at a seventh of NF4's error. The model decides and
    not the card at hand, so that a recipe trains on the same embeddings everywhere. Raises RecipeError,
    with the setting that names the folder.
    """
    try:
        if stored_quantization(folder) is not None:
            return "none"
        if setting != "auto":
            return setting
        return "int8" if count_parameters(T5EncoderModel, folder) > _LARGE else "none"
    except ValueError as error:
        raise RecipeError(f"{named_by}: {error}") from error


def tell_stored(setting: T5Setting, folder: Path) -> None:
    """Warns where the T5 in `folder` is stored packed otherwise than the setting has it."""
    stored = stored_quantization(folder)
    if stored is not None and setting not in ("auto", stored.quant_type):
        log.warning(
            "%s is quantized already and loaded as it is: %s; model.text_encoder_quant, %s, does not apply",
            folder,
            stored.describe(),
            setting,
        )


def t5_block_names(encoder: nn.Module) -> list[str]:
    """Of the encoder's blocks."""
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
    """The T5 in `folder`, streamed from disk to the device, or, block by block as it computes, from the host's memory.

    Raises RecipeError for damaged files, with the setting that names them, and where there is nothing packed to stream.
    """
    recipe = None if quant == "none" else QuantRecipe(quant, compute_dtype=dtype)
    log.info("loading T5 from %s, held %s", folder, "as it is stored" if recipe is None else f"in {quant}")
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
                "model.stream_text_encoder: got true, but T5 is held unpacked, and only packed blocks are streamed;"
                " expected false, or model.text_encoder_quant int8 or nf4"
            )
        BlockStream(blocks, copies_to(device))
    return encoder
