"""Starts an adapter by LoftQ: it represents as much of the quantization error as its rank allows.

Li et al. 2023 (arXiv 2310.08659), algorithm 1 with one iteration: the base is quantized as usual, and the
adapter starts at the best approximation of the error W - dequantize(quantize(W)). Further iterations would
quantize W minus the adapter, which is another base in other files; one iteration leaves the stored base
unchanged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.quant.layers.linear4bit import Linear4bit

# Extra columns of the randomized decomposition, and passes over the matrix. The spectrum of a rounding error is
# flat, so both are more than usual; with these the approximation is within 1 % of the best one.
_OVERSAMPLING = 16
_PASSES = 8


@dataclass(frozen=True)
class Repair:
    """The share of the error that the adapters took over."""

    layers: int
    share: float  # of the squared error over all those layers, 0 to 1


def factors_of(matrix: Tensor, rank: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns down (rank, K) and up (N, rank); up @ down is close to the best approximation of (N, K).

    Subspace iteration from a random start of `source`, a CPU generator (Halko et al. 2011, algorithm 4.4).
    Both factors get the square root of each singular value, so neither learns faster. In fp32, on the
    matrix's device.
    """
    matrix = matrix.float()
    columns = min(rank + _OVERSAMPLING, *matrix.shape)
    start = torch.randn(matrix.shape[1], columns, generator=source).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_PASSES):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    root = values[:rank].sqrt()
    down, up = root[:, None] * right[:rank], (basis @ left[:, :rank]) * root
    # For a matrix smaller than the rank, the rest of the adapter stays zero.
    missing = rank - root.numel()
    return nn.functional.pad(down, (0, 0, 0, missing)), nn.functional.pad(up, (0, missing))


@torch.no_grad()
def start_from_error(
    model: nn.Module, folder: Path, adapter: str, source: Callable[[str], torch.Generator]
) -> Repair:
    """Gives `adapter` on each 4-bit layer of `model` the layer's quantization error; returns how much of it that is.

    `folder` holds the weights before quantization, which are read again one at a time; `source` returns a CPU
    generator for a layer's path. Adapters on other layers keep their start.

    Raises:
        ValueError: the folder lacks a weight in full precision.
    """
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), Linear4bit)
    }
    lost = kept = 0.0
    with ShardedWeights(folder) as weights:
        known = set(weights.names)
        # In the file's order, so that it is read sequentially.
        order = {name: number for number, name in enumerate(weights.names)}
        for path in sorted(layers, key=lambda path: order.get(f"{path}.weight", -1)):
            name = f"{path}.weight"
            layer = layers[path]
            base = layer.get_base_layer()
            shape = (base.out_features, base.in_features)
            if name not in known or weights.shape(name) != shape:
                found = "there is none" if name not in known else f"found {weights.shape(name)}"
                raise ValueError(
                    f"{folder}: the error of {name} needs the weight in full precision, of shape {shape}: {found}"
                )
            weight = weights.read(name).to(base.weight.device, torch.float32)
            # The layer multiplies by this weight, rounded to the compute dtype.
            error = weight - base.dequantize(base.compute_dtype).float()
            down, up = factors_of(error, layer.r[adapter], source(path))
            root = layer.scaling[adapter] ** 0.5
            layer.lora_A[adapter].weight.copy_(down / root)
            layer.lora_B[adapter].weight.copy_(up / root)
            before = error.square().sum(dtype=torch.float64).item()
            lost += (error - up @ down).square().sum(dtype=torch.float64).item()
            kept += before
    return Repair(len(layers), 1 - lost / kept if kept else 0.0)
