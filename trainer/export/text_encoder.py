"""Exports the large text encoder, T5, in NF4, as a folder that stock transformers loads with bitsandbytes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import T5EncoderModel

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.files.atomic import write_file
from halfbyte.quant.files.shards import TEXT_WEIGHTS_FILE, write_weights
from halfbyte.quant.load.serialize import (
    CONFIG_FILE,
    DEFAULT_SHARD_BYTES,
    quantization_config,
    split_statistic,
)
from halfbyte.quant.load.text_encoder import load_text_encoder
from halfbyte.quant.load.transformer import read_config
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.pretrained.component import Component

_BLOCKS = "encoder.block."


@dataclass(frozen=True)
class WrittenTextEncoder:
    """The tensors and the configuration of an exported T5."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]


def check_text_encoder(t5: Component) -> None:
    """Checks that the T5 can be quantized.

    Raises:
        RecipeError: Its configuration cannot be read, or it is already quantized.
    """
    try:
        config = read_config(t5.path)
    except ValueError as error:
        raise RecipeError(f"{t5.setting}: {error}") from error
    if "quantization_config" in config:
        raise RecipeError(
            f"--text-encoder: {t5.path} is already quantized; use it unchanged, and export without --text-encoder"
        )


def write_text_encoder(t5: Component, folder: Path, device: torch.device) -> WrittenTextEncoder:
    """Quantizes the T5 on `device` and writes it into the empty `folder`.

    Raises:
        RecipeError: The T5 is damaged or already quantized.
    """
    check_text_encoder(t5)
    recipe = QuantRecipe("nf4", compute_dtype=torch.bfloat16)
    try:
        config = read_config(t5.path)
        model = load_text_encoder(T5EncoderModel, t5.path, recipe, dtype=torch.bfloat16, device=device)
    except ValueError as error:
        raise RecipeError(f"{t5.setting}: {error}") from error
    groups: dict[str, dict[str, Tensor]] = {}
    written: set[int] = set()
    for name, tensor in model.state_dict().items():
        statistic = split_statistic(name)
        # state_dict() lists the shared embedding under two names.
        if statistic is None and tensor.data_ptr() in written:
            continue
        written.add(tensor.data_ptr())
        groups.setdefault(name if statistic is None else statistic[0], {})[name] = tensor
    config |= {"quantization_config": quantization_config(recipe), "dtype": "bfloat16"}
    config.pop("_name_or_path", None)
    _write(groups, config, folder)
    return WrittenTextEncoder({name: t for group in groups.values() for name, t in group.items()}, config)


def write_first_block(written: WrittenTextEncoder, folder: Path) -> None:
    """Writes a T5 with only the first block into the empty `folder`."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in written.tensors.items():
        if not name.startswith(_BLOCKS) or name.startswith(f"{_BLOCKS}0."):
            statistic = split_statistic(name)
            groups.setdefault(name if statistic is None else statistic[0], {})[name] = tensor
    _write(groups, {**written.config, "num_layers": 1}, folder)


def _write(groups: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], folder: Path) -> None:
    write_file(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_weights(
        groups.values(), folder, max_shard_bytes=DEFAULT_SHARD_BYTES, weights_file=TEXT_WEIGHTS_FILE
    )
