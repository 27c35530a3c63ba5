"""What our quantizers behind diffusers and behind transformers share: placement, what must be there, the count."""

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn

from halfbyte.quant.layers.linear4bit import Params4bit
from halfbyte.quant.layers.quantized_layer import QuantizedLayer, QuantizedParameter
from halfbyte.quant.load.fill import check_finite


def default_device() -> torch.device:
    """Where a quantized model goes when no device_map says otherwise."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def check_device_map(device_map: Any) -> None:
    """Raises ValueError, naming a module, where a map of modules leaves one on the disk, where no codes are read."""
    if isinstance(device_map, Mapping) and "disk" in device_map.values():
        module = next(name for name, device in device_map.items() if device == "disk")
        raise ValueError(
            f"device_map: {module or 'the whole model'} would be on the disk, accepted: GPUs and the CPU;"
            " raise max_memory, or place it on the cpu"
        )


def check_loaded(model: nn.Module) -> None:
    """Raises ValueError, naming the tensor, where a quantized layer has no weight or a parameter is not finite."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and not has_weight(module):
            raise ValueError(f"{path}.weight: missing from the checkpoint")
    for name, parameter in model.named_parameters():
        # On meta is what accelerate keeps on the CPU until it is used.
        if not parameter.is_meta:
            check_finite(name, parameter.detach())


def has_weight(layer: QuantizedLayer) -> bool:
    """Whether the layer has been given its weight; a loader may have put a plain parameter in its place."""
    weight: nn.Parameter = layer.weight
    return isinstance(weight, QuantizedParameter) and weight.statistics is not None


def count_weights(model: Any) -> None:
    """Has the `num_parameters` of a model of either library count a packed weight by its shape.

    Their own knows no 4-bit weights but those of bitsandbytes, and fails where that is not installed.
    """
    model.num_parameters = MethodType(num_parameters, model)


def num_parameters(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """How many parameters a model has, those of quantized layers by the shapes of their weights."""
    left_out = {
        id(module.weight)
        for module in model.modules()
        if exclude_embeddings and isinstance(module, nn.Embedding)
    }
    return sum(
        _weights(parameter)
        for parameter in model.parameters()
        if id(parameter) not in left_out and (parameter.requires_grad or not only_trainable)
    )


def _weights(parameter: nn.Parameter) -> int:
    state = parameter.quant_state if isinstance(parameter, Params4bit) else None
    return parameter.numel() if state is None else state.shape.numel()
