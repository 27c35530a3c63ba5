"""Load a diffusers model from a folder into quantized layers, tensor by tensor.

Besides the packed model there are only the next few tensors in memory. A folder in full precision is quantized
on the way; a folder that bitsandbytes or this package has quantized is taken as it is, to the bit.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.convert.replace_linears import convert
from halfbyte.quant.convert.skip_list import kept_in_fp32
from halfbyte.quant.files.read_ahead import FileRead
from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.quant.load.fill import OnLayerLoaded, OnProgress, fill
from halfbyte.quant.load.serialize import CONFIG_FILE, quantization_config, read_quantization_config

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=ModelMixin)


def load_quantized(
    model_cls: type[Model],
    folder: Path,
    recipe: QuantRecipe | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: OnProgress | None = None,
    on_file: FileRead | None = None,
    place: OnLayerLoaded | None = None,
) -> Model:
    """The model of `folder` in eval mode on `device`, frozen and quantized by `recipe`, or in `dtype` without one.

    Weights are cast to `dtype` before they are quantized, and so is everything that is not quantized, as
    `from_pretrained(torch_dtype=dtype)` does. Where the folder is quantized already, its own settings hold,
    all but `recipe.compute_dtype`. On the CPU such a folder is mapped, and must stay as it is while the model
    lives. `on_file` is told the digest of each file of weights once it has been read, `place` gets each quantized
    layer when it has its weight.

    Raises ValueError, naming the file or the tensor, where files or tensors are missing, left over, damaged or
    of another shape, or belong to another class of model.
    """
    folder, device = Path(folder), torch.device(device)
    config = read_config(folder, model_cls.__name__)
    stored = config.get("quantization_config")
    if stored is not None:
        if not isinstance(stored, dict):
            raise ValueError(f"{folder / CONFIG_FILE}: quantization_config is not an object")
        own = read_quantization_config(stored, str(folder / CONFIG_FILE), dtype=dtype)
        recipe = merge_settings(own, recipe, folder)
    model = empty_model(model_cls, config, folder, dtype)
    if recipe is not None:
        convert(model, recipe, check_skip=stored is None)
        model.register_to_config(quantization_config=quantization_config(recipe))
    with ShardedWeights(folder) as weights:
        fill(
            model,
            weights,
            packed=stored is not None,
            dtype=dtype,
            device=device,
            in_fp32=kept_in_fp32(model),
            progress=progress,
            on_file=on_file,
            place=place,
        )
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
    # transformers' own have no _class_name.
    stored_class = config.get("_class_name", next(iter(config.get("architectures") or ()), class_name))
    if class_name is not None and stored_class != class_name:
        raise ValueError(f"{path}: describes a {stored_class}, expected a {class_name}")
    return config


def stored_quantization(folder: Path) -> QuantRecipe | None:
    """How a model's folder is quantized, by its config.json; None where it is not. Raises ValueError."""
    stored = read_config(folder).get("quantization_config")
    if stored is None:
        return None
    if not isinstance(stored, dict):
        raise ValueError(f"{folder / CONFIG_FILE}: quantization_config is not an object")
    return read_quantization_config(stored, str(folder / CONFIG_FILE))


def empty_model(
    model_cls: type[Model], config: dict[str, Any], folder: Path, dtype: torch.dtype = torch.bfloat16
) -> Model:
    """The model that `config` describes, its parameters on meta; ValueError, naming the folder, where none does."""
    try:
        with default_dtype(dtype), init_empty_weights():
            model: Model = model_cls.from_config(config)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / CONFIG_FILE}: no {model_cls.__name__} can be built from it: {error}"
        ) from error
    return model


def merge_settings(own: QuantRecipe, asked: QuantRecipe | None, folder: Path) -> QuantRecipe:
    """The settings of a quantized folder; only what the products run in is still open to choice."""
    if asked is None:
        return own
    settled = replace(own, compute_dtype=asked.compute_dtype)
    if replace(asked, blocksize=own.blocksize) != settled:
        log.warning(
            "%s is quantized already and loaded as it is: %s; what was asked for, %s, does not apply",
            folder,
            settled.describe(),
            asked.describe(),
        )
    return settled


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within it, new parameters are of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
