"""Single layers of a quantized model that multiply by their weight in full precision, beside the packed one.

Stock diffusers can leave out of the quantization only what its skip list can name, and some layers it cannot name
alone: FLUX's last one, `proj_out`, is called as the largest layer of each of its 38 single blocks. Such a layer keeps
its packed weight, which is what is saved and what stock diffusers loads, and gets the exact one for its products.
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
"""Beside a packed model's own files, which do not name it: the exact weights, for those who read them."""

Read = Callable[[str], Tensor]
"""A weight (out, in) by its name."""


def hold_exact(model: nn.Module, paths: Sequence[str], read: Read) -> None:
    """Gives the layers at `paths` their weights in full precision, in the dtype of their products.

    Layers that are not quantized are exact as they are. Raises ValueError for paths that are no linear layer's, that
    lie within a block, whose packed weights go into products of the whole block, or under an adapter; and for weights
    of another shape.
    """
    for path in paths:
        layer = _layer(model, path)
        if not isinstance(layer, QuantizedLayer):
            continue
        if _in_block(path):
            raise ValueError(
                f"got {path!r}, which lies within a block; expected layers outside of the blocks"
            )
        weight = read(f"{path}.weight")
        if weight.shape != (layer.out_features, layer.in_features):
            raise ValueError(
                f"{path}: expected a weight of shape {(layer.out_features, layer.in_features)}, got"
                f" {tuple(weight.shape)}"
            )
        layer.exact = weight.to(layer.weight.device, layer.compute_dtype)


def exact_weights(folder: Path) -> ShardedWeights:
    """Where the exact weights of the model in `folder` are: beside the packed ones, or all of them.

    Raises ValueError where there are none.
    """
    if (folder / EXACT_FILE).is_file():
        return ShardedWeights(folder, EXACT_FILE)
    return ShardedWeights(folder)


def write_exact(paths: Sequence[str], weights: ShardedWeights, folder: Path, dtype: torch.dtype) -> None:
    """Writes the exact weights of the layers at `paths` beside the packed model in `folder`."""
    names = [f"{path}.weight" for path in paths]
    save_file({name: weights.read(name).to(dtype).contiguous() for name in names}, folder / EXACT_FILE)


def _layer(model: nn.Module, path: str) -> nn.Linear:
    """The linear layer at `path`. Raises ValueError."""
    modules = dict(model.named_modules())
    found = modules.get(path)
    if hasattr(found, "base_layer"):
        raise ValueError(
            f"got {path!r}, which has an adapter, that multiplies by the packed weight; leave it out of lora.targets"
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
            f"got {path!r}, which is no linear layer of {type(model).__name__}; expected whole paths, of"
            f" {', '.join(accepted) or 'none'}{hint}"
        )
    return found


def _in_block(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))
