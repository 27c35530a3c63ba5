"""A quantized model as the folder that diffusers reads with bitsandbytes: config.json and safetensors."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn

from halfbyte.kernels.rows import WEIGHT_DTYPES
from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.convert.skip_list import is_skipped, kept_in_fp32
from halfbyte.quant.files.atomic import put_in_place, work_folder, write_file
from halfbyte.quant.files.shards import write_weights
from halfbyte.quant.formats import int8, packing
from halfbyte.quant.formats.nf4 import QuantSpec
from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.quant.layers.linear8bit import Linear8bit
from halfbyte.quant.layers.quantized_layer import QuantizedLayer

CONFIG_FILE = "config.json"
DEFAULT_SHARD_BYTES = 10 * 10**9  # diffusers' own

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}


def quantization_config(recipe: QuantRecipe) -> dict[str, Any]:
    """The `quantization_config` of config.json, with every key that diffusers' BitsAndBytesConfig writes."""
    eight = recipe.quant_type == "int8"
    return {
        "_load_in_4bit": not eight,
        "_load_in_8bit": eight,
        "bnb_4bit_compute_dtype": str(recipe.compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        # What BitsAndBytesConfig has there when nobody names a type.
        "bnb_4bit_quant_type": "fp4" if eight else recipe.quant_type,
        "bnb_4bit_use_double_quant": recipe.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(recipe.skip) or None,
        "llm_int8_threshold": recipe.llm_int8_threshold,
        "load_in_4bit": not eight,
        "load_in_8bit": eight,
        "quant_method": "bitsandbytes",
    }


def read_quantization_config(
    config: Mapping[str, Any], where: str, *, dtype: torch.dtype = torch.bfloat16
) -> QuantRecipe:
    """The recipe that a `quantization_config` stands for; ValueError, beginning with `where`, for any other kind.

    The block size is not in it: each weight's own statistics say that. `dtype`, that of what is not quantized, is
    what int8 products run in: bitsandbytes takes the input's, and writes a compute dtype that means nothing there.
    """
    method = config.get("quant_method")
    four, eight = (config.get(key, config.get(f"_{key}")) is True for key in ("load_in_4bit", "load_in_8bit"))
    if method != "bitsandbytes" or four == eight:
        raise ValueError(
            f"{where}: quantization_config has quant_method {method!r}; accepted: bitsandbytes with load_in_4bit,"
            " or with load_in_8bit"
        )
    if eight and config.get("llm_int8_has_fp16_weight", False) is not False:
        raise ValueError(f"{where}: llm_int8_has_fp16_weight is set, and weights in fp16 are not quantized")
    storage = config.get("bnb_4bit_quant_storage", "uint8")
    if storage != "uint8":
        raise ValueError(f"{where}: bnb_4bit_quant_storage is {storage!r}, accepted: uint8")
    compute_dtype = config.get("bnb_4bit_compute_dtype", "float32")
    if four and (not isinstance(compute_dtype, str) or compute_dtype not in _DTYPES):
        raise ValueError(
            f"{where}: bnb_4bit_compute_dtype is {compute_dtype!r}, accepted: {', '.join(_DTYPES)}"
        )
    skip = config.get("llm_int8_skip_modules") or []
    if not isinstance(skip, list) or not all(isinstance(entry, str) for entry in skip):
        raise ValueError(f"{where}: llm_int8_skip_modules is {skip!r}, expected a list of module names")
    threshold = config.get("llm_int8_threshold", int8.DEFAULT_THRESHOLD)
    if type(threshold) not in (int, float):
        raise ValueError(f"{where}: llm_int8_threshold is {threshold!r}, expected a number")
    try:
        return QuantRecipe(
            quant_type="int8" if eight else config.get("bnb_4bit_quant_type", "fp4"),
            double_quant=bool(config.get("bnb_4bit_use_double_quant", False)),
            compute_dtype=dtype if eight else _DTYPES[compute_dtype],
            skip=tuple(skip),
            llm_int8_threshold=threshold,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def save_quantized(
    model: nn.Module,
    folder: Path,
    recipe: QuantRecipe | None = None,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a converted diffusers model so that stock diffusers loads it; the folder appears whole or not at all.

    Without `recipe` the settings are those that the model was loaded with. Adapters on the model are left out.
    Raises ValueError where the model's quantized layers are not those that the recipe means, and FileExistsError
    where the folder holds something.
    """
    folder = Path(folder)
    model_name = type(model).__name__
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: holds files already; name an empty or a new folder")
    if not isinstance(model, ConfigMixin):
        raise ValueError(f"{model_name}: not a diffusers model, it has no config to save")
    config = json.loads(model.to_json_string())
    if recipe is None:
        if "quantization_config" not in config:
            raise ValueError(f"{model_name}: is not quantized; load it with load_quantized and a recipe")
        recipe = read_quantization_config(config["quantization_config"], model_name)
    _check_layers(model, recipe)
    tensors = base_tensors(model)
    config["quantization_config"] = quantization_config(recipe)
    # Where the model came from, often a path on this machine, is nothing to publish.
    config.pop("_name_or_path", None)
    with work_folder(folder) as work:
        write_file(work / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_weights(_groups(tensors), work, max_shard_bytes=max_shard_bytes)
        put_in_place(work, folder)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without adapters, under the names that it has without them."""
    tuned = _tuned(model)
    named = ((_base_name(name, tuned), tensor) for name, tensor in model.state_dict().items())
    return {name: tensor for name, tensor in named if name is not None}


def _tuned(model: nn.Module) -> list[str]:
    """The paths that an adapter of PEFT has taken, with the layer of the model below it as `base_layer`."""
    return [path for path, module in model.named_modules() if hasattr(module, "base_layer")]


def _base_name(name: str, tuned: Sequence[str]) -> str | None:
    """The name of a tensor or module without adapters; None where it belongs to an adapter."""
    for path in tuned:
        base = f"{path}.base_layer"
        if name == base or name.startswith(f"{base}."):
            return path + name.removeprefix(base)
        if name.startswith(f"{path}."):
            return None
    return name


def split_statistic(key: str) -> tuple[str, str] | None:
    """The name of a quantized weight and that of its statistic; None where the key names no statistic."""
    return packing.split_key(key) or int8.split_key(key)


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Each weight with its statistics; diffusers cannot load one whose statistics are in another shard."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        statistic = split_statistic(name)
        groups.setdefault(name if statistic is None else statistic[0], {})[name] = tensor
    yield from groups.values()


def _check_layers(model: nn.Module, recipe: QuantRecipe) -> None:
    skip, tuned = (*recipe.skip, *kept_in_fp32(model)), _tuned(model)
    for name, module in model.named_modules():
        path = _base_name(name, tuned)
        if path is None or not isinstance(module, nn.Linear):
            continue
        skipped = is_skipped(path, skip)
        if isinstance(module, QuantizedLayer):
            if skipped or not _is_meant(module, recipe):
                raise ValueError(
                    f"{path}: quantized with {_described(module)}, which is not what {recipe} says"
                )
        elif not skipped:
            raise ValueError(f"{path}: not quantized, though {recipe} does not skip it")


def _is_meant(layer: QuantizedLayer, recipe: QuantRecipe) -> bool:
    if isinstance(layer, Linear8bit):
        return recipe.quant_type == "int8" and layer.threshold == recipe.llm_int8_threshold
    assert isinstance(layer, Linear4bit)
    # The block size is in each weight's own statistics, so a config cannot contradict it; how a scale was found
    # is in no file.
    spec = replace(layer.spec, scale_search=None)
    return recipe.quant_type != "int8" and spec == QuantSpec(
        recipe.quant_type, recipe.double_quant, spec.blocksize
    )


def _described(layer: QuantizedLayer) -> str:
    if isinstance(layer, Linear8bit):
        return f"int8, threshold {layer.threshold:g}"
    return str(layer.spec)
