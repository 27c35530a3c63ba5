"""Places a pipeline's models: on the device, offloaded by diffusers, or spread over devices by accelerate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import cpu_offload, dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory, get_max_memory
from torch import nn

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.runtime.sizes import file_size

# The share of a device's free memory that weights may use. The rest is for activations.
_SHARE = 0.8


@dataclass(frozen=True)
class Placement:
    """The placement of a pipeline's models."""

    device: torch.device
    """The device that computes; with a device map, the first one."""
    offload: str = "none"
    """none: all models stay on the device. model: models stay in host memory, and each moves to the device
    while it computes. sequential: the same for each layer."""
    device_map: str | None = None
    """auto: fill the first device, then the next, then host memory. balanced: spread evenly over all devices.
    None: no map."""
    max_memory: Mapping[int | str, int] | None = None
    """Bytes per device for the device map, keyed as accelerate keys them. None: 80 % of the free memory."""

    @property
    def loads_on(self) -> torch.device:
        """The device onto which a model is loaded before it is placed."""
        spread = self.offload == "sequential" or self.device_map is not None
        return torch.device("cpu") if spread else self.device

    @property
    def moves_layers(self) -> bool:
        """True if hooks on each layer move its weights to the device."""
        return self.offload == "sequential" or self.device_map is not None

    @property
    def stays(self) -> bool:
        """True if a placed model stays on the device as a whole."""
        return self.offload == "none" and self.device_map is None

    @property
    def holds_all(self) -> bool:
        """True if a pipeline can hold all of its models at once, because idle models are in host memory."""
        return self.offload != "none"

    def place(self, pipeline: Any) -> None:
        """Places every model of a stock pipeline.

        Raises:
            RecipeError: A device map has no room for a model.
        """
        if self.offload == "model":
            pipeline.enable_model_cpu_offload(device=self.device)
        elif self.offload == "sequential":
            # Same as the pipeline's enable_sequential_cpu_offload, except that diffusers numbers the device.
            # For torch, cpu:0 is not the same device as cpu, and accelerate's parameters would become plain
            # tensors.
            for model in _models(pipeline).values():
                cpu_offload(model, self.device, offload_buffers=bool(model._parameters))
        elif self.device_map is not None:
            for name, model in _models(pipeline).items():
                self.spread(model, name)
        else:
            pipeline.to(self.device)

    def spread(self, model: nn.Module, name: str) -> None:
        """Spreads a model from host memory over the devices without splitting a block.

        Raises:
            RecipeError: The model does not fit into the available memory.
        """
        classes = list(getattr(model, "_no_split_modules", None) or ())
        memory: dict[Any, Any] = dict(self._memory() if self.max_memory is None else self.max_memory)
        if self.device_map == "balanced":
            memory = get_balanced_memory(model, memory, no_split_module_classes=classes)
        found = infer_auto_device_map(model, memory, no_split_module_classes=classes)
        if "disk" in found.values():
            room = ", ".join(f"{device} {file_size(size)}" for device, size in memory.items())
            raise RecipeError(
                f"--device-map: {name} does not fit into the available memory ({room}); choose a smaller --quant or"
                " --text-encoder-quant"
            )
        dispatch_model(model, found, main_device=self._main(found))

    def _main(self, found: Mapping[str, Any]) -> Any:
        devices = [device for device in found.values() if device not in ("cpu", "disk")]
        return devices[0] if devices else "cpu"

    @staticmethod
    def _memory() -> dict[int | str, int]:
        return {device: int(size * _SHARE) for device, size in get_max_memory().items()}


def _models(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
