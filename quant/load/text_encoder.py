"""Loads a transformers text encoder from a folder tensor by tensor, and quantizes it if a recipe is given."""

import logging
import re
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedConfig, PreTrainedModel

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.quant.convert.skip_list import linear_layers
from halfbyte.quant.files.shards import TEXT_WEIGHTS_FILE, ShardedWeights
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.fill import OnLayerLoaded, OnProgress, check_headers, fill
from halfbyte.quant.load.limits import refuse_oversized
from halfbyte.quant.load.not_filled import NotFilled
from halfbyte.quant.load.on_meta import built_on_meta, place_weights_on_meta
from halfbyte.quant.load.serialize import CONFIG_FILE, read_quantization_config, split_statistic
from halfbyte.quant.load.tensor_names import is_harmless, own_names
from halfbyte.quant.load.transformer import blame_config, default_dtype, read_config, stored_quantization

log = logging.getLogger(__name__)

TextEncoder = TypeVar("TextEncoder", bound=PreTrainedModel)


def load_text_encoder(
    model_cls: type[TextEncoder],
    folder: Path,
    recipe: QuantRecipe | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: OnProgress | None = None,
    place: OnLayerLoaded | None = None,
) -> TextEncoder:
    """Loads the encoder of `folder` to `device`, frozen and in eval mode.

    It is quantized with `recipe`, or in `dtype` without a recipe. An already quantized folder keeps its own
    settings. In 4 bits, the modules that transformers would keep in fp32 are not quantized but in `dtype`:
    T5's forward casts the input of its `wo` to the weight's dtype, and for packed codes that is uint8. In
    int8 these modules are quantized too. `place` is called with each quantized layer when it has its weight.

    Raises ValueError, naming the file or the tensor, where files or tensors are missing, damaged or of the
    wrong shape.
    """
    folder, device = Path(folder), torch.device(device)
    config = read_config(folder)
    stored = config.get("quantization_config")
    if stored is not None:
        own = read_quantization_config(stored, str(folder / CONFIG_FILE), dtype=dtype)
        if recipe is not None and recipe.quant_type != own.quant_type:
            log.warning(
                "%s: already quantized with %s, which is kept; the recipe's %s does not apply",
                folder,
                own.quant_type,
                recipe.quant_type,
            )
        recipe = own
    model = _empty_encoder(model_cls, folder, dtype)
    with ShardedWeights(folder, TEXT_WEIGHTS_FILE) as weights:
        tied, surplus = _fit(model, weights, recipe, packed=stored is not None)
        fill(
            model,
            weights,
            packed=stored is not None,
            dtype=dtype,
            device=device,
            leave_out={*surplus, *tied},
            progress=progress,
            place=place,
        )
    for target, source in tied.items():
        _share(model, target, source)
    # Moves the buffers that are not in the checkpoint: the model computed them when it was built, on the CPU.
    return model.to(device).eval().requires_grad_(False)


def check_text_encoder(model_cls: type[PreTrainedModel], folder: Path) -> None:
    """Checks that `load_text_encoder` would find the right tensors, from the configuration and the headers.

    Raises ValueError, see `load_text_encoder`.
    """
    stored = stored_quantization(folder)
    with ShardedWeights(folder, TEXT_WEIGHTS_FILE) as weights:
        refuse_oversized(read_config(folder), folder / CONFIG_FILE, most_layers=len(weights.names))
        with built_on_meta():
            model = _built(model_cls, folder)
            tied, surplus = _fit(model, weights, stored, packed=stored is not None)
        check_headers(model, weights, packed=stored is not None, leave_out={*surplus, *tied})


def _fit(
    model: PreTrainedModel, weights: ShardedWeights, recipe: QuantRecipe | None, *, packed: bool
) -> tuple[dict[str, str], set[str]]:
    """Prepares an empty model and the names of its weights for `fill`.

    Returns the tied parameters, see `_tied`, and the names of tensors in the files that are not needed.
    """
    weights.use_names(own_names(weights.names, model.state_dict()))
    tied = _tied(model, weights.names)
    ignored = [
        re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    ]
    surplus = {name for name in weights.names if any(pattern.search(name) for pattern in ignored)}
    own = model.state_dict().keys()
    surplus |= {name for name in weights.names if name not in own and is_harmless(name)}
    if recipe is not None:
        layers = {parts[0] for parts in map(split_statistic, weights.names) if parts} if packed else None
        _convert(model, recipe, layers)
    return tied, surplus


def count_parameters(model_cls: type[PreTrainedModel], folder: Path) -> int:
    """Counts the parameters of a folder's encoder from its config, shared parameters once."""
    model = _empty_encoder(model_cls, folder, torch.bfloat16)
    tied = _tied_names(model)
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name not in tied)


def text_encoder_on_meta(
    model_cls: type[TextEncoder], folder: Path, recipe: QuantRecipe | None, dtype: torch.dtype
) -> TextEncoder:
    """Returns the encoder that `load_text_encoder` would load, without values, from the folder's config.

    The config of an already quantized encoder does not say which layers are packed. This assumes all linear
    layers except those that transformers keeps in fp32.
    """
    model = _empty_encoder(model_cls, folder, dtype)
    stored = stored_quantization(folder)
    with built_on_meta():
        if stored is not None:
            kept = set(model._keep_in_fp32_modules or ())
            layers = {f"{path}.weight" for path, _ in linear_layers(model) if not kept & set(path.split("."))}
            _convert(model, stored, layers)
        elif recipe is not None:
            _convert(model, recipe, None)
    for target, source in _tied_names(model).items():
        _share(model, target, source)
    place_weights_on_meta(model, dtype)
    return model


def _empty_encoder(model_cls: type[TextEncoder], folder: Path, dtype: torch.dtype) -> TextEncoder:
    with default_dtype(dtype), init_empty_weights(), NotFilled():
        return _built(model_cls, folder)


def text_config(model_cls: type[PreTrainedModel], folder: Path) -> PreTrainedConfig:
    """Reads the configuration of a text encoder. Raises ValueError, naming the file, if it is damaged."""
    read_config(folder)
    with blame_config(folder / CONFIG_FILE, model_cls):
        config = model_cls.config_class.from_pretrained(folder, local_files_only=True)
        assert isinstance(config, PreTrainedConfig)
    return config


def _built(model_cls: type[TextEncoder], folder: Path) -> TextEncoder:
    config = text_config(model_cls, folder)
    with blame_config(folder / CONFIG_FILE, model_cls):
        return model_cls(config)


def _convert(model: PreTrainedModel, recipe: QuantRecipe, layers: set[str] | None) -> None:
    """Replaces the linear layers with weights in `layers`, or by default all that can be quantized."""
    kept = set(model._keep_in_fp32_modules or ()) if recipe.quant_type != "int8" else set()
    for path, linear in list(linear_layers(model)):
        name = f"{path}.weight"
        wanted = name in layers if layers is not None else not kept & set(path.split("."))
        if wanted and not isinstance(linear, QuantizedLayer):
            model.set_submodule(path, recipe.quantized(linear, name))


def _tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Returns the tied parameters that the class declares: name -> name of the parameter that it shares."""
    tied = getattr(model, "_tied_weights_keys", None) or {}
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {target: source for target, source in tied.items() if target in own and source in own}


def _tied(model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """Returns `_tied_names`, with a pair swapped if the file's `names` contain only its first name."""
    tied = {}
    for target, source in _tied_names(model).items():
        if target in names and source not in names:
            target, source = source, target
        tied[target] = source
    return tied


def _share(model: PreTrainedModel, target: str, source: str) -> None:
    """Makes the parameter `target` the same object as the parameter `source`."""
    path, _, leaf = target.rpartition(".")
    model.get_submodule(path).register_parameter(leaf, model.get_parameter(source))
