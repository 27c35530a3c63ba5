"""Our layers behind diffusers' own `from_pretrained`, in place of bitsandbytes."""

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
    """Suffix -> key of the statistics that a state dict has for the weight at `key`."""
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
    for entry in skip:
        try:
            check_skip_list(model, [entry])
        except ValueError as error:
            # One list for several models is common; bitsandbytes says nothing.
            log.warning("%s; quantizing without it", error)


class HalfbyteConfig(BitsAndBytesConfig):
    """bitsandbytes' settings, without asking that bitsandbytes be installed."""

    def post_init(self) -> None:
        """Checks the settings themselves; the stock check asks for the version of bitsandbytes as well."""
        read_quantization_config(self.to_dict(), "quantization_config")


class HalfbyteQuantizer(DiffusersQuantizer):
    """Loads bitsandbytes checkpoints into our layers, and quantizes others on the way in; CPU or CUDA."""

    use_keep_in_fp32_modules = True
    requires_calibration = False
    torch_dtype: torch.dtype
    """Of what is not quantized."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._awaited: set[str] = set()  # what the files should hold and has not been read
        self._files_left = 0
        self._held: dict[str, Tensor] = {}  # of weights that are not complete

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Raises ValueError for a device map with modules on the disk."""
        check_device_map(device_map)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """float16 where nothing is asked for, as with bitsandbytes."""
        self.torch_dtype = torch.float16 if torch_dtype is None else torch_dtype
        return self.torch_dtype

    def update_device_map(self, device_map: Any) -> Any:
        """The current GPU, or the CPU where there is none."""
        return {"": default_device()} if device_map is None else device_map

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        """What `device_map="auto"` counts a quantized weight as."""
        return torch.int8 if self.quantization_config.load_in_8bit else CustomDtype.INT4

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, Any]:
        """Leaves a tenth for the weight that is being quantized."""
        return {device: size * 0.9 if isinstance(size, int) else size for device, size in max_memory.items()}

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Raises ValueError, naming the tensor, where the checkpoint lacks one: it would stay on meta."""
        if missing_keys:
            raise ValueError(f"{min(missing_keys)}: missing from the checkpoint")
        return missing_keys

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
        """Notes what is going to be read."""
        self._awaited, self._files_left = set(loaded_keys), len(checkpoint_files)
        return loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """What can be put in place after a file: a weight waits for statistics that are in another.

        Raises ValueError, naming the tensor, where the last file is read and one of the index was in none.
        """
        if not self.pre_quantized:
            return state_dict
        self._awaited -= state_dict.keys()
        self._files_left -= 1
        if self._awaited and not self._files_left:
            raise ValueError(f"{min(self._awaited)}: in none of the files, though the index names it")
        incomplete = {_weight_of(key) for key in self._awaited}
        read = self._held | state_dict
        self._held = {key: tensor for key, tensor in read.items() if _weight_of(key) in incomplete}
        return {key: tensor for key, tensor in read.items() if key not in self._held}

    @property
    def supports_parallel_loading(self) -> bool:
        """Not where weights wait for what is in the next file."""
        return not self.pre_quantized

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **_: Any
    ) -> bool:
        """Whether the parameter is a quantized layer's weight, which `create_quantized_param` puts in place."""
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
        """Puts a weight in place, packed or yet to be quantized. Raises ValueError naming the tensor."""
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
        """Raises ValueError, naming the tensor, where a weight is missing or a parameter not finite."""
        check_loaded(model)
        count_weights(model)
        return model

    def dequantize_model(self, model: nn.Module) -> nn.Module:
        """What `model.dequantize()` does: plain layers in the dtype of the others, see `quant.dequantize`."""
        dequantize_model(model, self.torch_dtype)
        return model

    @property
    def is_serializable(self) -> bool:
        """save_pretrained writes bitsandbytes' files: the layers' state dict has their keys."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train through the frozen layers."""
        return True


def register() -> None:
    """From here on diffusers' `from_pretrained` builds our layers for bitsandbytes checkpoints and configs."""
    for kind in ("bitsandbytes_4bit", "bitsandbytes_8bit"):
        AUTO_QUANTIZER_MAPPING[kind] = HalfbyteQuantizer
        AUTO_QUANTIZATION_CONFIG_MAPPING[kind] = HalfbyteConfig
