"""Adds an adapter to a model and changes its strength by scaling B in place, without loading or compiling again."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer as PeftLayer
from torch import Tensor, nn

from halfbyte.trainer.adapters.lora import ADAPTER, LoraVariant, add_lora, start_from
from halfbyte.trainer.adapters.saved import LoraLayer
from halfbyte.trainer.sample.source import Adapter


class AdapterStrength:
    """Changes the strength of an adapter. Keeps a copy of B, and of DoRA's magnitudes, at strength 1."""

    def __init__(self, denoiser: nn.Module) -> None:
        """Copies the adapter's weights. `denoiser` must have the adapter and not be placed on devices yet."""
        self._denoiser = denoiser
        self._ups: dict[nn.Module, Tensor] = {}
        self._magnitudes: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # of the base's rows, of the adapter
        for module in denoiser.modules():
            if isinstance(module, PeftLayer) and ADAPTER in module.lora_B:
                adapted: Any = module
                self._ups[adapted.lora_B[ADAPTER]] = _copy(adapted.lora_B[ADAPTER].weight)
                if ADAPTER in adapted.lora_magnitude_vector:
                    magnitude = adapted.lora_magnitude_vector[ADAPTER]
                    base = _copy(magnitude.base_squares.sqrt())
                    self._magnitudes[magnitude] = (base, _copy(magnitude.weight))

    @torch.no_grad()
    def set(self, strength: float) -> None:
        """Scales B, and interpolates DoRA's magnitudes from the base's (0) to the adapter's (1).

        Strength 0 turns the adapter off, which is bitwise identical to the base.
        """
        model: Any = self._denoiser
        if strength == 0:
            model.disable_adapters()
            return
        model.enable_adapters()
        for module, up in self._ups.items():
            _stored_weight(module).copy_(up if strength == 1 else up * strength)
        for module, (base, adapted) in self._magnitudes.items():
            _stored_weight(module).copy_(adapted if strength == 1 else base + (adapted - base) * strength)


def put_on(denoiser: nn.Module, adapter: Adapter, name: str) -> None:
    """Adds an adapter to the model, with its own rank on each of its layers and exactly the saved weights."""
    targets = "|".join(re.escape(layer) for layer in adapter.layers)
    ranks = _by_rank(adapter.layers)
    highest = max(ranks)
    # PEFT matches patterns at the end of names. ^ anchors them, because one layer's name may be the end of another's.
    patterns = {
        f"^({'|'.join(map(re.escape, names))})": rank for rank, names in ranks.items() if rank != highest
    }
    add_lora(
        denoiser,
        rank=highest,
        alpha=highest,
        dropout=0.0,
        targets=targets,
        init="gaussian",
        seed=0,
        variant=LoraVariant(
            dora=adapter.is_dora,
            rank_pattern=patterns,
            # alpha = rank, a factor of 1: `start_from` puts the adapter's scale into B.
            alpha_pattern={pattern: float(rank) for pattern, rank in patterns.items()},
        ),
    )
    start_from(denoiser, adapter.layers, ADAPTER, name)


def _by_rank(layers: Mapping[str, LoraLayer]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, layer in layers.items():
        found.setdefault(layer.rank, []).append(name)
    return found


def _copy(tensor: Tensor) -> Tensor:
    # In host memory, where offloaded layers are scaled too, so that the copies take no device memory.
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _stored_weight(module: nn.Module) -> Tensor:
    """Returns the tensor that holds the module's weight; with accelerate's offloading, the hook's in host memory."""
    weight: Any = module.weight
    if not weight.is_meta:
        return weight.data  # type: ignore[no-any-return]
    hooked: Any = module
    stored: Tensor = hooked._hf_hook.weights_map["weight"]
    return stored
