"""A quantized model as the folder that diffusers reads with bitsandbytes: config.json and safetensors."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn

from halfbyte.quant.convert import QuantRecipe, is_skipped, kept_in_fp32
from halfbyte.quant.linear import Linear4bit
from halfbyte.quant.nf4 import WEIGHT_DTYPES, QuantSpec
from halfbyte.quant.packing import split_key
from halfbyte.quant.shards import write_text, write_weights

CONFIG_FILE = "config.json"
DEFAULT_SHARD_BYTES = 10 * 10**9  # diffusers' own

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}


def quantization_config(recipe: QuantRecipe) -> dict[str, Any]:
    """The `quantization_config` of config.json, with every key that diffusers' BitsAndBytesConfig writes."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(recipe.compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": recipe.quant_type,
        "bnb_4bit_use_double_quant": recipe.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(recipe.skip) or None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def read_quantization_config(config: Mapping[str, Any], where: str) -> QuantRecipe:
    """The recipe that a `quantization_config` stands for; ValueError, beginning with `where`, for any other kind.

    The block size is not in it: each weight's own statistics say that.
    """
    method = config.get("quant_method")
    if method != "bitsandbytes" or config.get("load_in_4bit", config.get("_load_in_4bit")) is not True:
        raise ValueError(
            f"{where}: quantization_config has quant_method {method!r}; accepted: bitsandbytes with load_in_4bit"
        )
    storage = config.get("bnb_4bit_quant_storage", "uint8")
    if storage != "uint8":
        raise ValueError(f"{where}: bnb_4bit_quant_storage is {storage!r}, accepted: uint8")
    compute_dtype = config.get("bnb_4bit_compute_dtype", "float32")
    if compute_dtype not in _DTYPES:
        raise ValueError(
            f"{where}: bnb_4bit_compute_dtype is {compute_dtype!r}, accepted: {', '.join(_DTYPES)}"
        )
    skip = config.get("llm_int8_skip_modules") or []
    if not isinstance(skip, list) or not all(isinstance(entry, str) for entry in skip):
        raise ValueError(f"{where}: llm_int8_skip_modules is {skip!r}, expected a list of module names")
    try:
        return QuantRecipe(
            quant_type=config.get("bnb_4bit_quant_type", "fp4"),
            double_quant=bool(config.get("bnb_4bit_use_double_quant", False)),
            compute_dtype=_DTYPES[compute_dtype],
            skip=tuple(skip),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def save_quantized(
    model: nn.Module,
    folder: Path,
    recipe: QuantRecipe,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a converted diffusers model so that stock diffusers loads it; the folder appears whole or not at all.

    Adapters on the model are left out. Raises ValueError where the model's 4-bit layers are not those that the
    recipe means, and FileExistsError where the folder holds something.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: holds files already; name an empty or a new folder")
    tensors = base_tensors(model)
    _check_layers(model, recipe)
    if not isinstance(model, ConfigMixin):
        raise ValueError(f"{type(model).__name__}: not a diffusers model, it has no config to save")
    config = json.loads(model.to_json_string()) | {"quantization_config": quantization_config(recipe)}
    work = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", work / CONFIG_FILE)
        write_weights(_groups(tensors), work, max_shard_bytes=max_shard_bytes)
        os.replace(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without adapters, under the names that it has without them."""
    tuned = [path for path, module in model.named_modules() if hasattr(module, "base_layer")]
    tensors = {}
    for name, tensor in model.state_dict().items():
        layer = next((path for path in tuned if name.startswith(f"{path}.")), None)
        if layer is None:
            tensors[name] = tensor
        elif name.startswith(f"{layer}.base_layer."):
            tensors[f"{layer}.{name.removeprefix(f'{layer}.base_layer.')}"] = tensor
    return tensors


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Each weight with its statistics; diffusers cannot load one whose statistics are in another shard."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        statistic = split_key(name)
        groups.setdefault(name if statistic is None else statistic[0], {})[name] = tensor
    yield from groups.values()


def _check_layers(model: nn.Module, recipe: QuantRecipe) -> None:
    skip = (*recipe.skip, *kept_in_fp32(model))
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        path = path.removesuffix(".base_layer")
        if isinstance(module, Linear4bit):
            expected = QuantSpec(recipe.quant_type, recipe.double_quant, module.spec.blocksize)
            if is_skipped(path, skip) or module.spec != expected:
                raise ValueError(f"{path}: is quantized as {module.spec}, which is not what {recipe} says")
        elif isinstance(module.weight, torch.Tensor) and not is_skipped(path, skip) and "lora_" not in path:
            raise ValueError(f"{path}: is not quantized, though {recipe} does not skip it")
