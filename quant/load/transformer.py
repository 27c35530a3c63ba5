"""Loads a diffusers model from a folder into quantized layers, tensor by tensor.

Apart from the packed model, only the next few tensors are in memory. A folder in full precision is quantized
while it loads. The codes of a folder that bitsandbytes or this package has quantized are loaded bitwise
identical.
"""

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
from halfbyte.quant.files.json_object import read_object
from halfbyte.quant.files.read_ahead import FileRead
from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.quant.load.fill import OnLayerLoaded, OnProgress, fill
from halfbyte.quant.load.limits import refuse_oversized
from halfbyte.quant.load.not_filled import NotFilled
from halfbyte.quant.load.serialize import CONFIG_FILE, quantization_config, read_quantization_config
from halfbyte.quant.load.tensor_names import own_names

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
    """Loads the model of `folder` to `device` in eval mode, quantized with `recipe` or else in `dtype`.

    Weights are cast to `dtype` before they are quantized, and tensors that are not quantized are cast to
    `dtype` as `from_pretrained(torch_dtype=dtype)` does. An already quantized folder keeps its own settings,
    except `recipe.compute_dtype`. `on_file` is called with each weight file and its digest once the file has been
    read. `place` is called with each quantized layer when it has its weight.

    Raises ValueError, naming the file or the tensor, where files or tensors are missing, unexpected, damaged
    or of the wrong shape, or the folder holds another class of model.
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
        weights.use_names(own_names(weights.names, model.state_dict()))
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
    # Moves the buffers that are not in the checkpoint: the model computed them when it was built, on the CPU.
    return model.to(device).eval()


def read_config(folder: Path, class_name: str | None = None) -> dict[str, Any]:
    """Reads the config.json of a model's folder.

    Raises ValueError if it is missing, not a JSON object, or describes a class other than `class_name`.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{path}: missing; expected the folder of a diffusers model")
    config = read_object(path)
    refuse_oversized(config, path)
    if "auto_map" in config:
        raise ValueError(
            f"{path}: auto_map names code in the model's repository, which is never run; expected a model of a class"
            " in diffusers or transformers"
        )
    architectures = config.get("architectures") or ()
    if not isinstance(architectures, list | tuple):
        raise ValueError(f"{path}: architectures is {architectures!r}, expected a list of class names")
    # diffusers writes _class_name, transformers writes architectures.
    stored_class = config.get("_class_name", next(iter(architectures), class_name))
    if class_name is not None and stored_class != class_name:
        raise ValueError(f"{path}: describes a {stored_class}, expected a {class_name}")
    return config


def stored_quantization(folder: Path) -> QuantRecipe | None:
    """Reads how a model's folder is quantized from its config.json; returns None if it is not quantized.

    Raises ValueError for a config that is damaged or not supported.
    """
    stored = read_config(folder).get("quantization_config")
    if stored is None:
        return None
    if not isinstance(stored, dict):
        raise ValueError(f"{folder / CONFIG_FILE}: quantization_config is not an object")
    return read_quantization_config(stored, str(folder / CONFIG_FILE))


def empty_model(
    model_cls: type[Model], config: dict[str, Any], folder: Path, dtype: torch.dtype = torch.bfloat16
) -> Model:
    """Builds the model that `config` describes, with its parameters on meta.

    Raises ValueError, naming the config file, if that fails.
    """
    with (
        blame_config(folder / CONFIG_FILE, model_cls),
        default_dtype(dtype),
        init_empty_weights(),
        NotFilled(),
    ):
        model: Model = model_cls.from_config(config)
    return model


@contextmanager
def blame_config(file: Path | str, model_cls: type[Any]) -> Iterator[None]:
    """Turns errors of a library that builds a model from a configuration into a ValueError with its file.

    Libraries hardly check the values of a configuration. A wrong one can cause any exception, so all are
    caught.
    """
    try:
        yield
    except Exception as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, KeyError | AttributeError | IndexError):
            reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: no {model_cls.__name__} can be built from it: {reason}") from error


def merge_settings(own: QuantRecipe, requested: QuantRecipe | None, folder: Path) -> QuantRecipe:
    """Returns a quantized folder's own settings with the requested compute dtype; warns if others differ."""
    if requested is None:
        return own
    merged = replace(own, compute_dtype=requested.compute_dtype)
    # The folder's config does not record the block size, so it is not compared.
    if replace(requested, blocksize=own.blocksize) != merged:
        log.warning(
            "%s: already quantized with %s, which is kept; the requested %s does not apply",
            folder,
            merged.describe(),
            requested.describe(),
        )
    return merged


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Sets torch's default dtype inside the block, so that new parameters have it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
