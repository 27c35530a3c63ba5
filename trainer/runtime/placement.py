"""Where a pipeline's models lie and compute: on the device, offloaded by diffusers, or spread by accelerate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import cpu_offload, dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory, get_max_memory
from torch import nn

from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.runtime.sizes import file_size

# Of a device's free memory; the rest is for what flows through the model.
_SHARE = 0.8


@dataclass(frozen=True)
class Placement:
    """How the models of a pipeline are placed."""

    device: torch.device
    """What computes; with a device map what comes first."""
    offload: str = "none"
    """none: on the device; model: in host memory, each on the device while it works; sequential: the same layer by
    layer."""
    device_map: str | None = None
    """auto: the first device full, then the next, then host memory; balanced: alike on all devices. None: no map."""
    max_memory: Mapping[int | str, int] | None = None
    """Bytes for a device map by device, as accelerate counts them; None: most of what is free."""

    @property
    def loads_on(self) -> torch.device:
        """Where a model is loaded, before it is placed."""
        spread = self.offload == "sequential" or self.device_map is not None
        return torch.device("cpu") if spread else self.device

    @property
    def moves_layers(self) -> bool:
        """Whether layers are brought to the device by hooks of their own, rather than lie there."""
        return self.offload == "sequential" or self.device_map is not None

    @property
    def stays(self) -> bool:
        """Whether a model lies whole on the device once it is placed."""
        return self.offload == "none" and self.device_map is None

    @property
    def holds_all(self) -> bool:
        """Whether a pipeline may have all of its models at once, since those at rest are in host memory."""
        return self.offload != "none"

    def place(self, pipeline: Any) -> None:
        """Places every model of a stock pipeline. Raises RecipeError where a device map has no room for one."""
        if self.offload == "model":
            pipeline.enable_model_cpu_offload(device=self.device)
        elif self.offload == "sequential":
            # What the pipeline's enable_sequential_cpu_offload does, but that it numbers the device: cpu:0 is to torch
            # another device than cpu, and accelerate's parameters come out of it as plain tensors.
            for model in _models(pipeline).values():
                cpu_offload(model, self.device, offload_buffers=bool(model._parameters))
        elif self.device_map is not None:
            for name, model in _models(pipeline).items():
                self.spread(model, name)
        else:
            pipeline.to(self.device)

    def spread(self, model: nn.Module, name: str) -> None:
        """Dispatches a model in host memory over the devices, blocks in one piece."""
        classes = list(getattr(model, "_no_split_modules", None) or ())
        memory: dict[Any, Any] = dict(self._memory() if self.max_memory is None else self.max_memory)
        if self.device_map == "balanced":
            memory = get_balanced_memory(model, memory, no_split_module_classes=classes)
        found = infer_auto_device_map(model, memory, no_split_module_classes=classes)
        if "disk" in found.values():
            room = ", ".join(f"{device} {file_size(size)}" for device, size in memory.items())
            raise RecipeError(
                f"--device-map: {name} does not fit into what is free ({room}); a smaller --quant or"
                " --text-encoder-quant may"
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
