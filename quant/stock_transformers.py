"""Our layers behind transformers' own `from_pretrained`, in place of bitsandbytes: T5 and CLIP in 4 bits or in 8."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from halfbyte.quant import int8, packing
from halfbyte.quant.convert import QuantizedLinear
from halfbyte.quant.dequantize import dequantize
from halfbyte.quant.linear import Params4bit
from halfbyte.quant.linear8bit import Int8Params
from halfbyte.quant.serialize import read_quantization_config
from halfbyte.quant.stock_diffusers import default_device


def _layer_at(model: nn.Module, parameter: str) -> QuantizedLinear:
    layer = model.get_submodule(parameter.rpartition(".")[0])
    assert isinstance(layer, QuantizedLinear)
    return layer


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value


class _Quantize(ConversionOps):
    """A full-precision weight into its layer."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], *, model: nn.Module, **_: Any) -> dict[str, nn.Parameter]:
        converted: dict[str, nn.Parameter] = {}
        for name, value in input_dict.items():
            layer = _layer_at(model, name)
            layer.quantize(_first(value), name)
            layer._is_hf_initialized = True  # type: ignore[assignment]
            converted[name] = layer.weight
        return converted


class _Unpack(ConversionOps):
    """Packed codes and their statistics into their layer."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, full_layer_name: str, **_: Any
    ) -> dict[str, Any]:
        tensors = {name: _first(value) for name, value in input_dict.items()}
        if set(tensors) == {"weight"}:  # a layer that was not quantized
            return tensors
        packed = tensors.pop("weight")
        layer = _layer_at(model, full_layer_name)
        layer.load_packed(packed, {n.removeprefix("weight."): t for n, t in tensors.items()}, full_layer_name)
        layer._is_hf_initialized = True  # type: ignore[assignment]
        return {"weight": layer.weight}


class HalfbyteHfQuantizer(HfQuantizer):
    """Loads bitsandbytes checkpoints into our layers, and quantizes others on the way in; CPU or CUDA."""

    requires_calibration = False

    @property
    def quantized_element_size(self) -> float:
        """Bytes that `device_map="auto"` counts a quantized weight's element as."""
        return 1.0 if self._eight else 0.5

    @property
    def _eight(self) -> bool:
        config: Any = self.quantization_config
        return bool(config.load_in_8bit)

    def update_device_map(self, device_map: Any) -> Any:
        """The current GPU, or the CPU where there is none."""
        return {"": default_device()} if device_map is None else device_map

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, Any]:
        """Leaves a tenth for the weight that is being quantized."""
        return {device: size * 0.9 if isinstance(size, int) else size for device, size in max_memory.items()}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        """Whether the parameter is a quantized layer's weight."""
        path, _dot, leaf = param_name.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(path), QuantizedLinear)

    def get_quantize_ops(self) -> ConversionOps:
        """What a full-precision weight goes through."""
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """What packed weights go through: each with its statistics."""
        if not self.pre_quantized:
            return []
        # The plain weight last: as a pattern it matches the others too.
        beside = int8.STATISTICS if self._eight else tuple(f"weight.{name}" for name in packing.STATISTICS)
        names = [*beside, "weight"]
        return [WeightConverter(names, "weight", [_Unpack(self)])]

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **_: Any) -> None:
        config: Any = self.quantization_config
        recipe = read_quantization_config(config.to_dict(), "quantization_config")
        # transformers' own rule for what is skipped; it is not the one of diffusers.
        skipped = self.get_modules_to_not_convert(
            model, config.llm_int8_skip_modules, model._keep_in_fp32_modules
        )
        for path, module in list(model.named_modules()):
            if type(module) is nn.Linear and should_convert_module(path, skipped):
                layer = recipe.quantized(module, f"{path}.weight")
                if self.pre_quantized:
                    # The loader casts what it reads to the dtype that it finds here.
                    meta = layer.weight.data
                    layer.weight = (
                        Int8Params(meta.to(torch.int8)) if self._eight else Params4bit(meta.to(torch.uint8))
                    )
                model.set_submodule(path, layer)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        model.is_loaded_in_8bit = self._eight
        model.is_loaded_in_4bit = not self._eight
        # save_pretrained would undo what loading converted; the layers' state dict is in the file's form already.
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or ()
            if not any(isinstance(operation, _Unpack) for operation in getattr(conversion, "operations", ()))
        ]
        return model

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """What `model.dequantize()` does: plain layers, in the dtype of the others unless one is given."""
        dequantize(model, model.dtype if dtype is None else dtype)
        return model

    def is_serializable(self) -> bool:
        """save_pretrained writes bitsandbytes' files: the layers' state dict has their keys."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train through the frozen layers."""
        return True


def register() -> None:
    """From here on transformers' `from_pretrained` builds our layers for bitsandbytes checkpoints and configs."""
    for kind in ("bitsandbytes_4bit", "bitsandbytes_8bit"):
        AUTO_QUANTIZER_MAPPING[kind] = HalfbyteHfQuantizer
