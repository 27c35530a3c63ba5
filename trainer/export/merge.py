"""An adapter merged into its base: added to the dequantized weights in fp32, which are then quantized again.

4 bits are coarse. Most of a small update moves no weight to the next code and is lost; what is left of it shows in
the scales. So each merge measures what became of the update.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.trainer.adapters.saved import LoraLayer
from halfbyte.trainer.errors import RecipeError

FAINT = 0.5  # an update of which less survived is warned about


@dataclass(frozen=True)
class Survival:
    """What became of one layer's update U, the stored weight having changed by C."""

    layer: str
    relative: float  # |U| / |W|
    kept: float  # <C, U> / <U, U>: 1 where all of it is there
    error: float  # |C - U| / |U|
    energy: float  # <U, U>


@torch.no_grad()
def merge(denoiser: nn.Module, layers: Mapping[str, LoraLayer]) -> list[Survival]:
    """Adds the updates to the weights of `denoiser`, which must have no adapters on it, in place.

    Raises RecipeError where a layer is not there or of another shape, before anything is changed.
    """
    found = {path: _layer(denoiser, path, layer) for path, layer in layers.items()}
    return [_merged(path, found[path], layer) for path, layer in layers.items()]


def total(survivals: Sequence[Survival]) -> float:
    """<C, U> / <U, U> over all layers."""
    energy = sum(survival.energy for survival in survivals)
    return sum(survival.kept * survival.energy for survival in survivals) / energy if energy else 1.0


def _layer(denoiser: nn.Module, path: str, layer: LoraLayer) -> nn.Linear:
    module = dict(denoiser.named_modules()).get(path)
    if not isinstance(module, nn.Linear):
        raise RecipeError(f"merge: the model has no linear layer {path}; the adapter is of another model")
    expected, got = (module.out_features, module.in_features), (len(layer.up), layer.down.shape[1])
    if expected != got:
        raise RecipeError(f"merge: {path}: the layer is {expected}, the adapter is for one of {got}")
    return module


def _merged(path: str, module: nn.Linear, layer: LoraLayer) -> Survival:
    before = _dense(module)
    device = before.device
    update = layer.scale * (layer.up.to(device, torch.float32) @ layer.down.to(device, torch.float32))
    merged = before + update
    if layer.lengths is not None:
        merged *= (layer.lengths.to(device, torch.float32) / merged.norm(dim=1))[:, None]
        update = merged - before
    _store(module, merged, path)
    change = _dense(module) - before
    energy = float(update.square().sum())
    return Survival(
        path,
        relative=float(update.norm() / before.norm()),
        kept=float((change * update).sum()) / energy if energy else 1.0,
        error=float((change - update).norm() / update.norm()) if energy else 0.0,
        energy=energy,
    )


def _dense(module: nn.Linear) -> Tensor:
    return module.dequantize(torch.float32) if isinstance(module, QuantizedLayer) else module.weight.float()


def _store(module: nn.Linear, weight: Tensor, path: str) -> None:
    if isinstance(module, Linear4bit):
        state = module.weight.quant_state
        assert state is not None
        dtype = state.dtype
        module.quantize(weight, f"{path}.weight")
        quantized = module.weight.quant_state
        assert quantized is not None
        # The file says in what the weight was before, and stock layers dequantize to that.
        module.weight.quant_state = replace(quantized, dtype=dtype)
    elif isinstance(module, QuantizedLayer):
        module.quantize(weight, f"{path}.weight")
    else:
        module.weight.data.copy_(weight)
