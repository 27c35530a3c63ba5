"""The quantizer that makes transformers' `from_pretrained` build our layers: T5 and CLIP in 4 or 8 bits."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from halfbyte.quant.convert.dequantize import dequantize_model
from halfbyte.quant.convert.skip_list import kept_in_fp32
from halfbyte.quant.formats import int8, packing
from halfbyte.quant.layers.linear4bit import Params4bit
from halfbyte.quant.layers.linear8bit import Int8Params
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.serialize import read_quantization_config
from halfbyte.quant.stock.model import (
    check_device_map,
    check_loaded,
    count_weights,
    default_device,
    has_weight,
)


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value


class _Quantize(ConversionOps):
    """The conversion of a full-precision weight: quantizes it into its layer."""

    def __init__(self, hf_quantizer: "HalfbyteHfQuantizer") -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], *, model: nn.Module, **_: Any) -> dict[str, nn.Parameter]:
        return {name: self._quantized(model, name, _first(value)) for name, value in input_dict.items()}

    def _quantized(self, model: nn.Module, name: str, value: Tensor) -> nn.Parameter:
        layer = model.get_submodule(name.rpartition(".")[0])
        assert isinstance(layer, QuantizedLayer)
        return self.hf_quantizer.fill(layer, lambda: layer.quantize(value, name))


class _Unpack(ConversionOps):
    """The conversion of packed codes and their statistics: loads them into their layer.

    The weight of a layer that is not quantized is only cast.
    """

    def __init__(self, hf_quantizer: "HalfbyteHfQuantizer") -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # transformers copies the converter for every weight. All copies must report to the same quantizer.
        return self

    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, full_layer_name: str, **_: Any
    ) -> dict[str, Tensor]:
        tensors = {name: _first(value) for name, value in input_dict.items()}
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        if isinstance(module, QuantizedLayer):
            return {"weight": self._unpacked(module, tensors, full_layer_name)}
        return {"weight": self._plain(model, tensors, full_layer_name)}

    def _unpacked(self, layer: QuantizedLayer, tensors: dict[str, Tensor], name: str) -> nn.Parameter:
        def load() -> None:
            if "weight" not in tensors:
                raise ValueError(f"{name}: missing; the file has only its {', '.join(sorted(tensors))}")
            statistics = {n.removeprefix("weight."): t for n, t in tensors.items() if n != "weight"}
            layer.load_packed(tensors["weight"], statistics, name)

        return self.hf_quantizer.fill(layer, load)

    def _plain(self, model: Any, tensors: dict[str, Tensor], name: str) -> Tensor:
        own = model.get_parameter_or_buffer(name)
        weight = tensors.get("weight")
        if weight is None or len(tensors) > 1 or weight.is_floating_point() != own.is_floating_point():
            self.hf_quantizer.problems.append(
                ValueError(f"{name}: packed in the file, but quantization_config does not quantize its layer")
            )
            return torch.zeros(own.shape, dtype=own.dtype)
        # transformers does not cast tensors that go through a quantizer.
        in_fp32 = own.dtype == torch.float16 and set(kept_in_fp32(model)) & set(name.split("."))
        return weight.to(torch.float32 if in_fp32 else own.dtype)


class HalfbyteHfQuantizer(HfQuantizer):
    """Loads bitsandbytes checkpoints into our layers, and quantizes others while loading; CPU or CUDA."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.problems: list[ValueError] = []
        """Errors in the checkpoint's weights, in the order of reading."""

    def fill(self, layer: QuantizedLayer, load: Callable[[], None]) -> nn.Parameter:
        """Calls `load`, which gives the layer its weight, and returns the weight.

        If `load` raises ValueError, records the error in `problems` and returns an empty weight: transformers
        would turn an exception during the conversion into a RuntimeError that does not name the tensor.
        """
        try:
            load()
        except ValueError as error:
            self.problems.append(error)
            layer.weight = layer.parameter_class.make(torch.empty(0, dtype=layer.code_dtype), False, None)
        return layer.weight

    @property
    def quantized_element_size(self) -> float:
        """Bytes per element with which `device_map="auto"` computes the size of a quantized weight."""
        return 1.0 if self._is_int8 else 0.5

    @property
    def _is_int8(self) -> bool:
        config: Any = self.quantization_config
        return bool(config.load_in_8bit)

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Raises ValueError for a device map with modules on the disk."""
        check_device_map(device_map)

    def update_device_map(self, device_map: Any) -> Any:
        """Returns the given device map, or by default the current GPU, or the CPU without one."""
        return {"": default_device()} if device_map is None else device_map

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, Any]:
        """Reserves a tenth of the memory for the weight that is being quantized."""
        return {device: size * 0.9 if isinstance(size, int) else size for device, size in max_memory.items()}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        """Tests whether the parameter is a quantized layer's weight."""
        path, _dot, leaf = param_name.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(path), QuantizedLayer)

    def get_quantize_ops(self) -> ConversionOps:
        """Returns the conversion of full-precision weights."""
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Returns the conversion of packed weights, which takes each weight with its statistics."""
        if not self.pre_quantized:
            return []
        statistics = (
            int8.STATISTICS if self._is_int8 else tuple(f"weight.{name}" for name in packing.STATISTICS)
        )
        # The plain weight goes last, because its pattern also matches the names of the statistics.
        names = [*statistics, "weight"]
        return [WeightConverter(names, "weight", [_Unpack(self)])]

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **_: Any) -> None:
        config: Any = self.quantization_config
        recipe = read_quantization_config(config.to_dict(), "quantization_config", dtype=model.dtype)
        # transformers' own rule for skipped modules, which differs from diffusers'.
        skipped = self.get_modules_to_not_convert(
            model, config.llm_int8_skip_modules, model._keep_in_fp32_modules
        )
        for path, module in list(model.named_modules()):
            if type(module) is nn.Linear and should_convert_module(path, skipped):
                layer = recipe.quantized(module, f"{path}.weight")
                if self.pre_quantized:
                    # The loader casts each tensor that it reads to the dtype of the parameter on meta.
                    meta = layer.weight.data
                    layer.weight = (
                        Int8Params(meta.to(torch.int8)) if self._is_int8 else Params4bit(meta.to(torch.uint8))
                    )
                model.set_submodule(path, layer)
        initialize = model.initialize_weights

        def initialize_weights() -> None:
            self._check_read(model)
            initialize()

        # After reading, transformers calls this to initialize parameters that the checkpoint lacks, which
        # fails for packed weights. So the check for missing weights runs first.
        model.initialize_weights = initialize_weights

    def _check_read(self, model: nn.Module) -> None:
        """Raises the first recorded problem, or ValueError naming a tensor that a quantized layer lacks."""
        if self.problems:
            raise self.problems[0]
        for path, module in model.named_modules():
            if not isinstance(module, QuantizedLayer):
                continue
            if not has_weight(module):
                raise ValueError(f"{path}.weight: missing from the checkpoint")
            # transformers sets this attribute on every parameter that it has read.
            if module.bias is not None and not hasattr(module.bias, "_is_hf_initialized"):
                raise ValueError(f"{path}.bias: missing from the checkpoint")

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Marks the model as quantized.

        Raises ValueError, naming a tensor that is missing, damaged or not finite.
        """
        del model.initialize_weights
        self._check_read(model)
        check_loaded(model)
        count_weights(model)
        model.is_loaded_in_8bit = self._is_int8
        model.is_loaded_in_4bit = not self._is_int8
        # save_pretrained would apply the conversions in reverse, but the layers' state dict is already in the
        # format of the file.
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or ()
            if not any(isinstance(operation, _Unpack) for operation in getattr(conversion, "operations", ()))
        ]
        return model

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Implements `model.dequantize()`: plain layers in `dtype`, by default that of the other tensors."""
        dequantize_model(model, model.dtype if dtype is None else dtype)
        return model

    def is_serializable(self) -> bool:
        """True: save_pretrained writes bitsandbytes' files, whose keys the layers' state dict has."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters can be trained on the frozen layers."""
        return True


def register() -> None:
    """Makes transformers' `from_pretrained` build our layers for bitsandbytes checkpoints and configs."""
    for kind in ("bitsandbytes_4bit", "bitsandbytes_8bit"):
        AUTO_QUANTIZER_MAPPING[kind] = HalfbyteHfQuantizer
