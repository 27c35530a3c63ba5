"""The way back: a quantized model as the plain one that it stands for."""

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from torch import nn

from halfbyte.kernels.rows import WEIGHT_DTYPES
from halfbyte.quant.convert.skip_list import kept_in_fp32
from halfbyte.quant.layers.quantized_layer import QuantizedLayer

# What loaders leave on a quantized model, and `save_pretrained` and `to` look at.
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
    """Replace the quantized layers of `model` in place by plain ones in `dtype`; returns their paths.

    All of the model is in `dtype` afterwards, but for what its class keeps in fp32, and nothing in it or its
    config says that it was quantized: `save_pretrained` writes a folder that stock `from_pretrained` loads. The
    parameters stay frozen.

    Raises ValueError, before anything is changed, where no layer is quantized, the dtype is none for weights, or
    adapters or hooks are on the layers: they belong to the layers that would go, so adapters are taken off first
    (`delete_adapters`, `unload_lora_weights`) and added again afterwards. Only accelerate's hooks that bring inputs
    to a layer's device, which loaders put on every layer, go over to the plain ones.
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
        # A layer under two names stays one layer.
        if id(layer) not in plain:
            plain[id(layer)] = _plain(layer, dtype)
        model.set_submodule(path, plain[id(layer)])
    _cast_rest(model, dtype)
    _forget(model)
    return tuple(path for path, _ in layers)


def _check_bare(model: nn.Module, layers: list[tuple[str, Any]]) -> None:
    model_name = type(model).__name__
    if getattr(model, "peft_config", None) or any(hasattr(m, "base_layer") for m in model.modules()):
        raise ValueError(
            f"{model_name}: has adapters; take them off (delete_adapters, unload_lora_weights), dequantize, and add"
            " them again"
        )
    for path, layer in layers:
        if _has_foreign_hook(layer):
            raise ValueError(f"{path}: has hooks, of offloading for example; remove them first")


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
    # What is saved, as loading casts it; buffers beside that were computed when the model was built.
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)


def _forget(model: nn.Module) -> None:
    for mark in _MARKS:
        # Only what was put on this model: its class may define a default or a property of the name.
        if mark in vars(model):
            delattr(model, mark)
    stock: Any = model
    config: Any = getattr(model, "config", None)
    if isinstance(model, ConfigMixin):
        # A FrozenDict, which cannot lose a key.
        stock._internal_dict = FrozenDict(
            {key: value for key, value in config.items() if key != "quantization_config"}
        )
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
