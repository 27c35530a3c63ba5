"""Saves a quantized model as a folder that diffusers loads with bitsandbytes: config.json and safetensors."""

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
DEFAULT_SHARD_BYTES = 10 * 10**9  # as in diffusers

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}


def quantization_config(recipe: QuantRecipe) -> dict[str, Any]:
    """Returns the `quantization_config` of config.json, with every key of diffusers' BitsAndBytesConfig."""
    eight = recipe.quant_type == "int8"
    return {
        "_load_in_4bit": not eight,
        "_load_in_8bit": eight,
        "bnb_4bit_compute_dtype": str(recipe.compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        # fp4 is BitsAndBytesConfig's default.
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
    """Reads the recipe from a `quantization_config`.

    The block size is not in the config but in each weight's statistics. int8 products run in `dtype`, the
    dtype of the tensors that are not quantized: for int8, bitsandbytes uses the input's dtype and ignores the
    compute dtype that it writes.

    Raises ValueError, beginning with `where`, for a config that is not bitsandbytes' or is not supported.
    """
    method = config.get("quant_method")
    four, eight = (config.get(key, config.get(f"_{key}")) is True for key in ("load_in_4bit", "load_in_8bit"))
    if method != "bitsandbytes" or four == eight:
        raise ValueError(
            f"{where}: quantization_config has quant_method {method!r}; accepted: bitsandbytes with load_in_4bit,"
            " or with load_in_8bit"
        )
    if eight and config.get("llm_int8_has_fp16_weight", False) is not False:
        raise ValueError(
            f"{where}: llm_int8_has_fp16_weight is set, so the weights are in fp16 and not quantized; accepted:"
            " false"
        )
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
    """Writes a converted diffusers model as a folder that stock diffusers loads; the write is atomic.

    Without `recipe`, the settings with which the model was loaded are saved. Adapters are not saved.

    Raises ValueError where the model's quantized layers do not match the recipe, and FileExistsError where
    the folder is not empty.
    """
    folder = Path(folder)
    model_name = type(model).__name__
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: already contains files; choose an empty or a new folder")
    if not isinstance(model, ConfigMixin):
        raise ValueError(f"{model_name}: not a diffusers model: it has no config to save")
    config = json.loads(model.to_json_string())
    if recipe is None:
        if "quantization_config" not in config:
            raise ValueError(f"{model_name}: not quantized; load the model with load_quantized and a recipe")
        recipe = read_quantization_config(config["quantization_config"], model_name)
    _check_layers(model, recipe)
    tensors = base_tensors(model)
    config["quantization_config"] = quantization_config(recipe)
    # The model's origin is often a path on this machine, which must not be published.
    config.pop("_name_or_path", None)
    with work_folder(folder) as work:
        write_file(work / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_weights(_groups(tensors), work, max_shard_bytes=max_shard_bytes)
        put_in_place(work, folder)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict without adapters, under the names that the model has without adapters."""
    tuned = _tuned(model)
    named = ((_base_name(name, tuned), tensor) for name, tensor in model.state_dict().items())
    return {name: tensor for name, tensor in named if name is not None}


def _tuned(model: nn.Module) -> list[str]:
    """Returns the paths of PEFT's adapter layers; each has the model's own layer as `base_layer`."""
    return [path for path, module in model.named_modules() if hasattr(module, "base_layer")]


def _base_name(name: str, tuned: Sequence[str]) -> str | None:
    """Returns the name that a tensor or module has without adapters; None if it belongs to an adapter."""
    for path in tuned:
        base = f"{path}.base_layer"
        if name == base or name.startswith(f"{base}."):
            return path + name.removeprefix(base)
        if name.startswith(f"{path}."):
            return None
    return name


def split_statistic(key: str) -> tuple[str, str] | None:
    """Splits a key into the name of a quantized weight and its statistic; returns None for any other key."""
    return packing.split_key(key) or int8.split_key(key)


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yields each weight with its statistics, because diffusers cannot load them from different shards."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        statistic = split_statistic(name)
        groups.setdefault(name if statistic is None else statistic[0], {})[name] = tensor
    yield from groups.values()


def _check_layers(model: nn.Module, recipe: QuantRecipe) -> None:
    """Raises ValueError, naming a linear layer, if it is not quantized or skipped as the recipe says."""
    skip, tuned = (*recipe.skip, *kept_in_fp32(model)), _tuned(model)
    for name, module in model.named_modules():
        path = _base_name(name, tuned)
        if path is None or not isinstance(module, nn.Linear):
            continue
        skipped = is_skipped(path, skip)
        if isinstance(module, QuantizedLayer):
            if skipped or not _matches(module, recipe):
                raise ValueError(
                    f"{path}: quantized with {_describe(module)}, which does not match the recipe {recipe}"
                )
        elif not skipped:
            raise ValueError(f"{path}: not quantized, but the recipe does not skip it: {recipe}")


def _matches(layer: QuantizedLayer, recipe: QuantRecipe) -> bool:
    """Tests whether the layer is quantized with the recipe's settings, as far as files record them."""
    if isinstance(layer, Linear8bit):
        return recipe.quant_type == "int8" and layer.threshold == recipe.llm_int8_threshold
    assert isinstance(layer, Linear4bit)
    # The block size is in each weight's statistics, so the config cannot contradict it. Files do not record
    # the scale search.
    spec = replace(layer.spec, scale_search=None)
    return recipe.quant_type != "int8" and spec == QuantSpec(
        recipe.quant_type, recipe.double_quant, spec.blocksize
    )


def _describe(layer: QuantizedLayer) -> str:
    if isinstance(layer, Linear8bit):
        return f"int8, threshold {layer.threshold:g}"
    return str(layer.spec)
