"""Selects the part of a model that the self-check compares: all of a small model, some blocks of a large one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.files.atomic import write_file
from halfbyte.quant.files.shards import write_weights
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.serialize import (
    CONFIG_FILE,
    base_tensors,
    quantization_config,
    read_quantization_config,
    split_statistic,
)
from halfbyte.trainer.adapters.saved import LoraLayer
from halfbyte.trainer.families.family import Family

_WHOLE_BYTES = 2 * 10**8  # models up to this size are compared completely
_SHARD_BYTES = 2 * 10**9


def is_large(tensors: Mapping[str, Tensor]) -> bool:
    """Returns True if a model of these tensors is so large that only a part of it is compared."""
    return sum(tensor.nbytes for tensor in tensors.values()) > _WHOLE_BYTES


@dataclass(frozen=True)
class ComparedPart:
    """The part of the model to compare."""

    config: Mapping[str, Any]
    blocks: Mapping[str, str] | None  # block -> its name in the part; None: the whole model

    def name(self, name: str, all_blocks: Sequence[str]) -> str | None:
        """Returns the name that a tensor or layer has in the part, or None if the part does not contain it."""
        if self.blocks is None:
            return name
        for block in all_blocks:
            if name.startswith(f"{block}."):
                own = self.blocks.get(block)
                return None if own is None else own + name.removeprefix(block)
        return name


def part_of(family: Family, denoiser: nn.Module, layers: Mapping[str, LoraLayer]) -> ComparedPart:
    """Selects the part of the denoiser to compare. `layers` are the layers with an adapter."""
    config = plain_config(family.denoiser_config)
    if not is_large(base_tensors(denoiser)):
        return ComparedPart(config, None)
    # From each kind, take the block with the most adapters, because a run may train only a few blocks.
    chosen = [
        max(kind, key=lambda block: sum(path.startswith(f"{block}.") for path in layers))
        for kind in family.block_kinds()
        if kind
    ]
    names, counts = {}, dict[str, int]()
    for block in chosen:
        stem = block.rpartition(".")[0]
        names[block] = f"{stem}.{counts.setdefault(stem, 0)}"
        counts[stem] += 1
    return ComparedPart(family.config_of_blocks(chosen), names)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a model's configuration without its quantization and its source."""
    return {
        key: value for key, value in config.items() if key not in ("quantization_config", "_name_or_path")
    }


def quant_recipe_of(denoiser: nn.Module) -> QuantRecipe | None:
    """Returns the quantization of the denoiser's base, or None if it is not quantized."""
    model: Any = denoiser
    stored = model.config.get("quantization_config")
    return None if stored is None else read_quantization_config(stored, "the model")


def quantized_config(config: Mapping[str, Any], recipe: QuantRecipe) -> dict[str, Any]:
    """Returns the configuration with the quantization added."""
    return dict(config) | {"quantization_config": quantization_config(recipe)}


def base_groups(
    denoiser: nn.Module, kept: ComparedPart, every: Sequence[str]
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Returns the part's tensors twice: dequantized to fp32, and as stored.

    A stored weight and its statistics are in one group. `every` lists all blocks of the model.
    """
    packed = {
        f"{path.removesuffix('.base_layer')}.weight": module
        for path, module in denoiser.named_modules()
        if isinstance(module, QuantizedLayer)
    }
    stored: dict[str, dict[str, Tensor]] = {}
    plain: list[dict[str, Tensor]] = []
    for name, tensor in base_tensors(denoiser).items():
        own = kept.name(name, every)
        if own is None:
            continue
        statistic = split_statistic(name)
        group = name if statistic is None or statistic[0] not in packed else statistic[0]
        stored.setdefault(group, {})[own] = tensor
        if name in packed:
            plain.append({own: packed[name].dequantize(torch.float32)})
        elif group == name:
            plain.append({own: tensor.float()})
    return plain, list(stored.values())


def write_part(folder: Path, config: Mapping[str, Any], groups: list[dict[str, Tensor]]) -> None:
    """Writes a model's folder. The tensors of a group are never split over two files."""
    folder.mkdir()
    write_file(folder / CONFIG_FILE, json.dumps(config))
    write_weights(groups, folder, max_shard_bytes=_SHARD_BYTES)
