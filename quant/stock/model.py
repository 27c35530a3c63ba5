"""The checks, default device and parameter count that our diffusers and transformers quantizers share."""

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from halfbyte.quant.layers.linear4bit import Params4bit
from halfbyte.quant.layers.quantized_layer import QuantizedLayer, QuantizedParameter
from halfbyte.quant.load.fill import check_finite


def default_device() -> torch.device:
    """Returns the device of a quantized model without a device_map: the current GPU, or else the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def check_device_map(device_map: Any) -> None:
    """Raises ValueError, naming a module that the map puts on the disk: codes cannot be read from there."""
    if isinstance(device_map, Mapping) and "disk" in device_map.values():
        module = next(name for name, device in device_map.items() if device == "disk")
        raise ValueError(
            f"device_map: {module or 'the whole model'} is placed on the disk, accepted: GPUs and the CPU; raise"
            " max_memory, or place it on the cpu"
        )


def check_loaded(model: nn.Module) -> None:
    """Raises ValueError, naming a quantized layer without a weight or a parameter that is not finite."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and not has_weight(module):
            raise ValueError(f"{path}.weight: missing from the checkpoint")
    for name, parameter in model.named_parameters():
        # accelerate's CPU offloading keeps parameters on meta until they are used.
        if not parameter.is_meta:
            check_finite(name, parameter.detach())


def has_weight(layer: QuantizedLayer) -> bool:
    """Tests whether the layer has a quantized weight; a loader may have set a plain parameter instead."""
    weight: nn.Parameter = layer.weight
    return isinstance(weight, QuantizedParameter) and weight.statistics is not None


def count_weights(model: Any) -> None:
    """Replaces the model's `num_parameters` by one that counts the elements of a packed weight by its shape.

    The libraries' own method supports only the 4-bit weights of bitsandbytes, and fails if that is not
    installed.
    """
    model.num_parameters = MethodType(num_parameters, model)


def num_parameters(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Counts a model's parameters, those of quantized layers by the shapes of their weights."""
    excluded = {
        id(module.weight)
        for module in model.modules()
        if exclude_embeddings and isinstance(module, nn.Embedding)
    }
    return sum(
        _weights(parameter)
        for parameter in model.parameters()
        if id(parameter) not in excluded and (parameter.requires_grad or not only_trainable)
    )


def _weights(parameter: nn.Parameter) -> int:
    state = parameter.quant_state if isinstance(parameter, Params4bit) else None
    return parameter.numel() if state is None else state.shape.numel()
