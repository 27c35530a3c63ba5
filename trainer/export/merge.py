"""Merges an adapter into its base: adds it to the dequantized weights in fp32 and quantizes them again.

4 bits are coarse. A small update moves few weights to another code and is mostly lost; what remains of it is
in the scales. Each merge therefore measures how much of the update is kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from halfbyte.quant.layers.linear4bit import Linear4bit
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.trainer.adapters.saved import LoraLayer
from halfbyte.trainer.errors import RecipeError

FAINT = 0.5  # warn about layers that keep a smaller part of their update


@dataclass(frozen=True)
class Survival:
    """The part of one layer's update that a merge keeps.

    W is the weight before the merge, U the update, and C the actual change of the stored weight.
    """

    layer: str
    relative: float  # |U| / |W|
    kept: float  # <C, U> / <U, U>: 1 if the update is kept completely
    error: float  # |C - U| / |U|
    energy: float  # <U, U>


@torch.no_grad()
def merge(denoiser: nn.Module, layers: Mapping[str, LoraLayer]) -> list[Survival]:
    """Adds the updates to the weights of `denoiser` in place. `denoiser` must have no adapters.

    Raises:
        RecipeError: A layer does not exist or has another shape. Raised before anything changes.
    """
    found = {path: _layer(denoiser, path, layer) for path, layer in layers.items()}
    return [_merged(path, found[path], layer) for path, layer in layers.items()]


def total(survivals: Sequence[Survival]) -> float:
    """Computes <C, U> / <U, U> over all layers."""
    energy = sum(survival.energy for survival in survivals)
    return sum(survival.kept * survival.energy for survival in survivals) / energy if energy else 1.0


def _layer(denoiser: nn.Module, path: str, layer: LoraLayer) -> nn.Linear:
    module = dict(denoiser.named_modules()).get(path)
    if not isinstance(module, nn.Linear):
        raise RecipeError(
            f"merge: the model has no linear layer {path}; expected an adapter of the same model"
        )
    expected, got = (module.out_features, module.in_features), (len(layer.up), layer.down.shape[1])
    if expected != got:
        raise RecipeError(f"merge: {path}: the layer has shape {expected}, the adapter's update {got}")
    return module


def _merged(path: str, module: nn.Linear, layer: LoraLayer) -> Survival:
    before = _dense(module)
    device = before.device
    update = layer.scale * (layer.up.to(device, torch.float32) @ layer.down.to(device, torch.float32))
    merged = before + update
    if layer.magnitude is not None:
        # DoRA: rescale each output row to its trained magnitude.
        merged *= (layer.magnitude.to(device, torch.float32) / merged.norm(dim=1))[:, None]
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
        # Keep the dtype that the weight had before quantization. It is stored in the file, and stock layers
        # dequantize to it.
        module.weight.quant_state = replace(quantized, dtype=dtype)
    elif isinstance(module, QuantizedLayer):
        module.quantize(weight, f"{path}.weight")
    else:
        module.weight.data.copy_(weight)
