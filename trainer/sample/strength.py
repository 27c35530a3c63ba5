"""An adapter on a model at any strength: B is scaled where it lies, so that nothing is loaded or compiled again."""

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
    """Holds an adapter's B, and DoRA's lengths, as they are at strength 1."""

    def __init__(self, denoiser: nn.Module) -> None:
        """`denoiser` has the adapter on it, and is not placed yet."""
        self._denoiser = denoiser
        self._ups: dict[nn.Module, Tensor] = {}
        self._lengths: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # of the base's rows, of the adapted rows
        for module in denoiser.modules():
            if isinstance(module, PeftLayer) and ADAPTER in module.lora_B:
                adapted: Any = module
                self._ups[adapted.lora_B[ADAPTER]] = _copy(adapted.lora_B[ADAPTER].weight)
                if ADAPTER in adapted.lora_magnitude_vector:
                    lengths = adapted.lora_magnitude_vector[ADAPTER]
                    base = _copy(lengths.base_squares.sqrt())
                    self._lengths[lengths] = (base, _copy(lengths.weight))

    @torch.no_grad()
    def set(self, strength: float) -> None:
        """Scales the update; DoRA's lengths go from the base's to the adapter's. 0 is the base as it is, to the bit."""
        model: Any = self._denoiser
        if strength == 0:
            model.disable_adapters()
            return
        model.enable_adapters()
        for module, up in self._ups.items():
            _held(module).copy_(up if strength == 1 else up * strength)
        for module, (base, adapted) in self._lengths.items():
            _held(module).copy_(adapted if strength == 1 else base + (adapted - base) * strength)


def put_on(denoiser: nn.Module, adapter: Adapter, name: str) -> None:
    """Puts an adapter on the layers that it adapts, at its own ranks and exactly as it was saved."""
    targets = "|".join(re.escape(layer) for layer in adapter.layers)
    ranks = _by_rank(adapter.layers)
    highest = max(ranks)
    # Patterns are for the ends of names; ^ makes them whole names, which others may end in.
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
            # The scale is in B, see `start_from`.
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
    # In host memory, for offloaded layers are scaled there; a device is given what fits in one pass.
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _held(module: nn.Module) -> Tensor:
    """The module's weight where its values are: with accelerate's offloading that is beside it, in host memory."""
    weight: Any = module.weight
    if not weight.is_meta:
        return weight.data  # type: ignore[no-any-return]
    hooked: Any = module
    held: Tensor = hooked._hf_hook.weights_map["weight"]
    return held
