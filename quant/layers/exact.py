"""Gives single layers of a quantized model their weight in full precision, next to the packed one.

Stock diffusers can leave a layer unquantized only if its skip list can select that layer. It cannot select
FLUX's last layer, `proj_out`: the largest layer of each of the 38 single blocks has the same name. Such a
layer keeps its packed weight, which is saved and which stock diffusers loads, and multiplies by the exact
weight.
"""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.quant.layers.quantized_layer import QuantizedLayer

EXACT_FILE = "exact.safetensors"
"""File with the exact weights in a packed model's folder. The model's own files do not refer to it."""

Read = Callable[[str], Tensor]
"""Reads a weight (out, in) by its name."""


def hold_exact(model: nn.Module, paths: Sequence[str], read: Read) -> None:
    """Gives the layers at `paths` their exact weights, cast to their compute dtype; skips unquantized layers.

    Raises ValueError for a path that is not a linear layer, that has an adapter, or that lies in a block
    (blocks stack their packed weights into joint products); and for a weight of another shape.
    """
    for path in paths:
        layer = _layer(model, path)
        if not isinstance(layer, QuantizedLayer):
            continue
        if _in_block(path):
            raise ValueError(f"got {path!r}, which is in a block; expected layers outside the blocks")
        weight = read(f"{path}.weight")
        if weight.shape != (layer.out_features, layer.in_features):
            raise ValueError(
                f"{path}: expected a weight of shape {(layer.out_features, layer.in_features)}, got"
                f" {tuple(weight.shape)}"
            )
        layer.exact = weight.to(layer.weight.device, layer.compute_dtype)


def exact_weights(folder: Path) -> ShardedWeights:
    """Opens the exact weights of the model in `folder`: `EXACT_FILE` if it exists, else the model's files.

    Raises ValueError if the folder has no weights.
    """
    if (folder / EXACT_FILE).is_file():
        return ShardedWeights(folder, EXACT_FILE)
    return ShardedWeights(folder)


def write_exact(paths: Sequence[str], weights: ShardedWeights, folder: Path, dtype: torch.dtype) -> None:
    """Writes the exact weights of the layers at `paths` in `dtype` into the packed model's `folder`."""
    names = [f"{path}.weight" for path in paths]
    save_file({name: weights.read(name).to(dtype).contiguous() for name in names}, folder / EXACT_FILE)


def _layer(model: nn.Module, path: str) -> nn.Linear:
    """Returns the linear layer at `path`. Raises ValueError if there is none, or if it has an adapter."""
    modules = dict(model.named_modules())
    found = modules.get(path)
    if hasattr(found, "base_layer"):
        raise ValueError(
            f"got {path!r}, which has an adapter, and adapters multiply by the packed weight; leave the layer out of"
            " lora.targets"
        )
    if not isinstance(found, nn.Linear):
        accepted = [
            name
            for name, module in modules.items()
            if isinstance(module, QuantizedLayer) and not _in_block(name) and not name.endswith("base_layer")
        ]
        near = difflib.get_close_matches(path, accepted, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"got {path!r}, which is no linear layer of {type(model).__name__}; accepted whole paths:"
            f" {', '.join(accepted) or 'none'}{hint}"
        )
    return found


def _in_block(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))
