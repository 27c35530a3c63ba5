"""Load a diffusers model from a folder into quantized layers, tensor by tensor.

At no time is more than one tensor in memory besides the packed model. A folder in full precision is quantized
on the way; a folder that bitsandbytes or this package has quantized is taken as it is, to the bit.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor, nn

from halfbyte.quant.convert import QuantizedLinear, QuantRecipe, convert, kept_in_fp32
from halfbyte.quant.serialize import (
    CONFIG_FILE,
    quantization_config,
    read_quantization_config,
    split_statistic,
)
from halfbyte.quant.shards import ShardedWeights

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=ModelMixin)

Progress = Callable[[int, int], None]
"""Called after each tensor with (tensors done, tensors in all)."""

_SHOWN = 5  # names in an error message


def load_quantized(
    model_cls: type[Model],
    folder: Path,
    recipe: QuantRecipe | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: Progress | None = None,
) -> Model:
    """The model of `folder` in eval mode on `device`, frozen and quantized by `recipe`, or in `dtype` without one.

    Weights are cast to `dtype` before they are quantized, and so is everything that is not quantized, as
    `from_pretrained(torch_dtype=dtype)` does. Where the folder is quantized already, its own settings hold,
    all but `recipe.compute_dtype`.

    Raises ValueError, naming the file or the tensor, where files or tensors are missing, left over, damaged or
    of another shape, or belong to another class of model.
    """
    folder, device = Path(folder), torch.device(device)
    config = read_config(folder, model_cls.__name__)
    stored = config.get("quantization_config")
    if stored is not None:
        if not isinstance(stored, dict):
            raise ValueError(f"{folder / CONFIG_FILE}: quantization_config is not an object")
        own = read_quantization_config(stored, str(folder / CONFIG_FILE))
        recipe = _settle(own, recipe, folder)
    model = empty_model(model_cls, config, folder, dtype)
    if recipe is not None:
        convert(model, recipe, check_skip=stored is None)
        model.register_to_config(quantization_config=quantization_config(recipe))
    with ShardedWeights(folder) as weights:
        _fill(model, weights, dtype, device, progress, quantized=stored is not None)
    # Buffers that are no part of the checkpoint were computed when the model was built.
    return model.to(device).eval()


def read_config(folder: Path, class_name: str | None = None) -> dict[str, Any]:
    """The config.json of a model's folder; ValueError where it is none, or of another class than `class_name`."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{path}: missing; expected the folder of a diffusers model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    stored_class = config.get("_class_name", class_name)
    if class_name is not None and stored_class != class_name:
        raise ValueError(f"{path}: describes a {stored_class}, expected a {class_name}")
    return config


def empty_model(
    model_cls: type[Model], config: dict[str, Any], folder: Path, dtype: torch.dtype = torch.bfloat16
) -> Model:
    """The model that `config` describes, its parameters on meta; ValueError, naming the folder, where none does."""
    try:
        with _default_dtype(dtype), init_empty_weights():
            model: Model = model_cls.from_config(config)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / CONFIG_FILE}: no {model_cls.__name__} can be built from it: {error}"
        ) from error
    return model


def _settle(own: QuantRecipe, asked: QuantRecipe | None, folder: Path) -> QuantRecipe:
    """The settings of a quantized folder; only what the products run in is still open to choice."""
    if asked is None:
        return own
    settled = replace(own, compute_dtype=asked.compute_dtype)
    if replace(asked, blocksize=own.blocksize) != settled:
        log.warning("%s is quantized already and loaded as it is: %s, not %s", folder, settled, asked)
    return settled


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _fill(
    model: ModelMixin,
    weights: ShardedWeights,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None,
    *,
    quantized: bool,
) -> None:
    expected = dict(model.state_dict())
    statistics = _statistics(model, weights) if quantized else {}
    theirs = {name for suffixes in statistics.values() for name in suffixes.values()}
    names = [name for name in weights.names if name not in theirs]
    _check_names(weights, set(expected), set(names))
    kept = set(kept_in_fp32(model))
    for done, name in enumerate(names, start=1):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        tensor_dtype = torch.float32 if kept & set(name.split(".")) else dtype
        try:
            if isinstance(module, QuantizedLinear) and leaf == "weight":
                if quantized:
                    found = {suffix: weights.read(key) for suffix, key in statistics.get(name, {}).items()}
                    module.load_packed(weights.read(name).to(device), found, name)
                else:
                    module.quantize(_cast(name, weights.read(name).to(device), tensor_dtype), name)
            else:
                _check_shape(name, weights.shape(name), tuple(expected[name].shape))
                tensor = weights.read(name).to(device)
                if expected[name].is_floating_point():
                    tensor = _cast(name, tensor, tensor_dtype)
                _place(module, leaf, tensor)
        except ValueError as error:
            raise ValueError(f"{weights.path(name)}: {error}") from error
        if progress is not None:
            progress(done, len(names))


def _statistics(model: nn.Module, weights: ShardedWeights) -> dict[str, dict[str, str]]:
    """The weight of each quantized layer -> the statistics in the file by suffix -> their names there."""
    layers = {
        f"{path}.weight" for path, module in model.named_modules() if isinstance(module, QuantizedLinear)
    }
    statistics: dict[str, dict[str, str]] = {}
    for name in weights.names:
        parts = split_statistic(name)
        if parts is not None and parts[0] in layers:
            statistics.setdefault(parts[0], {})[parts[1]] = name
    return statistics


def _check_names(weights: ShardedWeights, expected: set[str], found: set[str]) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    problems = [
        f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise ValueError(f"{weights.folder}: the weights do not fit {CONFIG_FILE}: {'; '.join(problems)}")


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {found}")


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    return tensor.to(dtype)


def _place(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    parameter = module._parameters.get(leaf)
    if parameter is None:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
