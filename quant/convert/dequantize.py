"""Dequantizes a model: replaces its quantized layers by plain linear layers."""

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from torch import nn

from halfbyte.kernels.rows import WEIGHT_DTYPES
from halfbyte.quant.convert.skip_list import kept_in_fp32
from halfbyte.quant.layers.quantized_layer import QuantizedLayer

# Attributes that loaders set on a quantized model, and that `save_pretrained` and `to` check.
_MARKS = (
    "hf_quantizer",
    "quantization_method",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "is_4bit_serializable",
    "is_8bit_serializable",
    "num_parameters",
)


def dequantize_model(model: nn.Module, dtype: torch.dtype) -> tuple[str, ...]:
    """Replaces the quantized layers of `model` in place by plain ones in `dtype`; returns their paths.

    Afterwards the whole model is in `dtype`, except the modules that its class keeps in fp32, and neither the
    model nor its config is marked as quantized: `save_pretrained` writes a folder that stock
    `from_pretrained` loads. The parameters stay frozen. accelerate's hooks that move inputs to a layer's
    device, which loaders put on every layer, move to the plain layers.

    Raises ValueError, before anything changes, where no layer is quantized, `dtype` is no weight dtype, or
    the layers have adapters or any other hooks. Those belong to the layers that are replaced: remove adapters
    first (`delete_adapters`, `unload_lora_weights`) and add them again afterwards.
    """
    model_name = type(model).__name__
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype: got {dtype}, accepted: float32, float16, bfloat16")
    layers = [
        (path, module)
        for path, module in model.named_modules(remove_duplicate=False)
        if path and isinstance(module, QuantizedLayer)
    ]
    if not layers:
        raise ValueError(f"{model_name}: has no quantized layer to dequantize")
    _check_bare(model, layers)
    plain: dict[int, nn.Linear] = {}
    for path, layer in layers:
        # A layer with two names stays one layer.
        if id(layer) not in plain:
            plain[id(layer)] = _plain(layer, dtype)
        model.set_submodule(path, plain[id(layer)])
    _cast_rest(model, dtype)
    _remove_marks(model)
    return tuple(path for path, _ in layers)


def _check_bare(model: nn.Module, layers: list[tuple[str, Any]]) -> None:
    model_name = type(model).__name__
    if getattr(model, "peft_config", None) or any(hasattr(m, "base_layer") for m in model.modules()):
        raise ValueError(
            f"{model_name}: has adapters; remove them (delete_adapters, unload_lora_weights), dequantize, and add them"
            " again"
        )
    for path, layer in layers:
        if _has_foreign_hook(layer):
            raise ValueError(f"{path}: has hooks, for example from offloading; remove them first")


def _has_foreign_hook(layer: Any) -> bool:
    hook = getattr(layer, "_hf_hook", None)
    only_aligns = isinstance(hook, AlignDevicesHook) and not hook.offload
    return bool((hook is not None and not only_aligns) or layer._forward_hooks or layer._forward_pre_hooks)


def _plain(layer: QuantizedLayer, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    hook: Any = getattr(layer, "_hf_hook", None)
    if hook is not None:
        remove_hook_from_module(layer)
        add_hook_to_module(linear, hook)
    return linear.train(layer.training)


def _cast_rest(model: nn.Module, dtype: torch.dtype) -> None:
    kept = set(kept_in_fp32(model))
    # Casts saved tensors only, as loading does. Other buffers keep the dtype in which the model computed
    # them.
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)


def _remove_marks(model: nn.Module) -> None:
    """Removes the loaders' attributes and the quantization config from the model."""
    for mark in _MARKS:
        # Only the instance's own attributes: the class may define a default or a property with the same name.
        if mark in vars(model):
            delattr(model, mark)
    stock: Any = model
    config: Any = getattr(model, "config", None)
    if isinstance(model, ConfigMixin):
        # The config is a FrozenDict, from which no key can be deleted.
        stock._internal_dict = FrozenDict(
            {key: value for key, value in config.items() if key != "quantization_config"}
        )
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
