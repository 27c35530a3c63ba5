"""A quantized model as the folder that diffusers reads with bitsandbytes: config.json and safetensors."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn

from halfbyte.quant.convert import QuantRecipe, is_skipped, kept_in_fp32
from halfbyte.quant.linear import Linear4bit
from halfbyte.quant.nf4 import WEIGHT_DTYPES, QuantSpec
from halfbyte.quant.packing import split_key
from halfbyte.quant.shards import flush, write_text, write_weights

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
    if not isinstance(compute_dtype, str) or compute_dtype not in _DTYPES:
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
    recipe: QuantRecipe | None = None,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a converted diffusers model so that stock diffusers loads it; the folder appears whole or not at all.

    Without `recipe` the settings are those that the model was loaded with. Adapters on the model are left out.
    Raises ValueError where the model's 4-bit layers are not those that the recipe means, and FileExistsError
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
    work = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", work / CONFIG_FILE)
        write_weights(_groups(tensors), work, max_shard_bytes=max_shard_bytes)
        flush(work)
        os.replace(work, folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


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


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Each weight with its statistics; diffusers cannot load one whose statistics are in another shard."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        statistic = split_key(name)
        groups.setdefault(name if statistic is None else statistic[0], {})[name] = tensor
    yield from groups.values()


def _check_layers(model: nn.Module, recipe: QuantRecipe) -> None:
    skip, tuned = (*recipe.skip, *kept_in_fp32(model)), _tuned(model)
    for name, module in model.named_modules():
        path = _base_name(name, tuned)
        if path is None or not isinstance(module, nn.Linear):
            continue
        skipped = is_skipped(path, skip)
        if isinstance(module, Linear4bit):
            # The block size is in each weight's own statistics, so a config cannot contradict it.
            expected = QuantSpec(recipe.quant_type, recipe.double_quant, module.spec.blocksize)
            if skipped or module.spec != expected:
                raise ValueError(f"{path}: quantized with {module.spec}, which is not what {recipe} says")
        elif not skipped:
            raise ValueError(f"{path}: not quantized, though {recipe} does not skip it")
