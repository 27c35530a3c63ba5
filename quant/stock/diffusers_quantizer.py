"""The quantizer that makes diffusers' `from_pretrained` build our layers in place of bitsandbytes'."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import CustomDtype
from diffusers import BitsAndBytesConfig
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from halfbyte.quant.convert.dequantize import dequantize_model
from halfbyte.quant.convert.replace_linears import convert
from halfbyte.quant.convert.skip_list import check_skip_list
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.serialize import read_quantization_config, split_statistic
from halfbyte.quant.stock.model import check_device_map, check_loaded, count_weights, default_device

log = logging.getLogger(__name__)


def own_statistics(key: str, state_dict: dict[str, Tensor]) -> dict[str, str]:
    """Finds the statistics of the weight at `key` in a state dict; returns suffix -> key."""
    found = {}
    for name in state_dict:
        split = split_statistic(name)
        if split is not None and split[0] == key:
            found[split[1]] = name
    return found


def _weight_of(key: str) -> str:
    statistic = split_statistic(key)
    return key if statistic is None else statistic[0]


def _warn_of_skip(model: nn.Module, skip: Sequence[str]) -> None:
    """Warns about every entry of a skip list that matches no layer, or too many."""
    for entry in skip:
        try:
            check_skip_list(model, [entry])
        except ValueError as error:
            # Not an error here: users often share one list between models, and bitsandbytes ignores such
            # entries.
            log.warning("%s; the entry is ignored", error)


class HalfbyteConfig(BitsAndBytesConfig):
    """diffusers' BitsAndBytesConfig, which works without bitsandbytes."""

    def post_init(self) -> None:
        """Checks the settings only; diffusers' own check also requires a version of bitsandbytes."""
        read_quantization_config(self.to_dict(), "quantization_config")


class HalfbyteQuantizer(DiffusersQuantizer):
    """Loads bitsandbytes checkpoints into our layers, and quantizes others while loading; CPU or CUDA."""

    use_keep_in_fp32_modules = True
    requires_calibration = False
    torch_dtype: torch.dtype
    """Dtype of the tensors that are not quantized."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._awaited: set[str] = set()  # keys of the checkpoint that have not been read yet
        self._files_left = 0
        # Tensors of weights that have not been read completely, kept until the rest has been read.
        self._held: dict[str, Tensor] = {}

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Raises ValueError for a device map with modules on the disk."""
        check_device_map(device_map)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Returns the requested dtype, or float16 by default, as with bitsandbytes."""
        self.torch_dtype = torch.float16 if torch_dtype is None else torch_dtype
        return self.torch_dtype

    def update_device_map(self, device_map: Any) -> Any:
        """Returns the given device map, or by default the current GPU, or the CPU without one."""
        return {"": default_device()} if device_map is None else device_map

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        """Returns the dtype with which `device_map="auto"` computes the size of a quantized weight."""
        return torch.int8 if self.quantization_config.load_in_8bit else CustomDtype.INT4

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, Any]:
        """Reserves a tenth of the memory for the weight that is being quantized."""
        return {device: size * 0.9 if isinstance(size, int) else size for device, size in max_memory.items()}

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Raises ValueError, naming a tensor that the checkpoint lacks: it would stay on meta."""
        if missing_keys:
            raise ValueError(f"{min(missing_keys)}: missing from the checkpoint")
        return missing_keys

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
        """Records the keys and the number of files that are going to be read."""
        self._awaited, self._files_left = set(loaded_keys), len(checkpoint_files)
        return loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors that can be loaded now, after one more file was read.

        A weight and its statistics can be in different files. This keeps the tensors of such a weight until
        all of them have been read.

        Raises ValueError, naming the tensor, if the last file has been read and a tensor of the index was in
        none.
        """
        if not self.pre_quantized:
            return state_dict
        self._awaited -= state_dict.keys()
        self._files_left -= 1
        if self._awaited and not self._files_left:
            raise ValueError(f"{min(self._awaited)}: not in any of the files, but the index lists it")
        incomplete = {_weight_of(key) for key in self._awaited}
        read = self._held | state_dict
        self._held = {key: tensor for key, tensor in read.items() if _weight_of(key) in incomplete}
        return {key: tensor for key, tensor in read.items() if key not in self._held}

    @property
    def supports_parallel_loading(self) -> bool:
        """False for quantized checkpoints, in which a weight may wait for a tensor in the next file."""
        return not self.pre_quantized

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **_: Any
    ) -> bool:
        """Tests whether the parameter is a quantized layer's weight, which `create_quantized_param` loads."""
        path, _dot, leaf = param_name.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(path), QuantizedLayer)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **_: Any,
    ) -> None:
        """Loads a packed weight, or quantizes a full-precision one. Raises ValueError, naming the tensor."""
        layer = model.get_submodule(param_name.rpartition(".")[0])
        assert isinstance(layer, QuantizedLayer)
        value = param_value.to(target_device)
        if not self.pre_quantized:
            layer.quantize(value, param_name)
            return
        keys = own_statistics(param_name, state_dict)
        statistics = {suffix: state_dict[key].to(target_device) for suffix, key in keys.items()}
        layer.load_packed(value, statistics, param_name)
        if unexpected_keys is not None:
            for key in keys.values():
                if key in unexpected_keys:
                    unexpected_keys.remove(key)

    def _process_model_before_weight_loading(
        self, model: nn.Module, device_map: Any, keep_in_fp32_modules: Any = (), **_: Any
    ) -> None:
        recipe = read_quantization_config(
            self.quantization_config.to_dict(), "quantization_config", dtype=self.torch_dtype
        )
        self.modules_to_not_convert = [*recipe.skip, *keep_in_fp32_modules]
        if not self.pre_quantized:
            _warn_of_skip(model, recipe.skip)
        convert(model, recipe, check_skip=False)
        stock: Any = model
        stock.config.quantization_config = self.quantization_config
        stock.is_loaded_in_8bit = recipe.quant_type == "int8"
        stock.is_loaded_in_4bit = not stock.is_loaded_in_8bit

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        """Raises ValueError, naming the tensor, if a weight is missing or a parameter is not finite."""
        check_loaded(model)
        count_weights(model)
        return model

    def dequantize(self, model: nn.Module) -> nn.Module:
        """Implements `model.dequantize()`: plain layers in the dtype of the other tensors."""
        dequantize_model(model, self.torch_dtype)
        return model

    @property
    def is_serializable(self) -> bool:
        """True: save_pretrained writes bitsandbytes' files, whose keys the layers' state dict has."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters can be trained on the frozen layers."""
        return True


def register() -> None:
    """Makes diffusers' `from_pretrained` build our layers for bitsandbytes checkpoints and configs."""
    for kind in ("bitsandbytes_4bit", "bitsandbytes_8bit"):
        AUTO_QUANTIZER_MAPPING[kind] = HalfbyteQuantizer
        AUTO_QUANTIZATION_CONFIG_MAPPING[kind] = HalfbyteConfig
