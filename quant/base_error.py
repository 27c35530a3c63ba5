"""How far a quantized model is from the weights that it was made of, measured on its layers as they stand."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from halfbyte.quant.convert import QuantizedLinear
from halfbyte.quant.shards import ShardedWeights

SAMPLE = 500_000


@dataclass(frozen=True)
class BaseError:
    """Over all quantized layers together."""

    relative: float  # RMS: |restored - weight| / |weight|
    layers: int
    measured: int  # weights that were compared
    weights: int  # of the quantized layers


def base_error(model: nn.Module, folder: Path, *, sample: int = SAMPLE) -> BaseError:
    """Compares with the folder that the model was quantized from, in full precision; adapters are left out.

    sample: weights compared a layer at most, in whole rows spread evenly. Raises ValueError where the folder does
    not hold a layer's weight.
    """
    squares = errors = 0.0
    layers = measured = total = 0
    with ShardedWeights(folder) as weights:
        for path, layer in model.named_modules():
            if not isinstance(layer, QuantizedLinear):
                continue
            name = f"{path.removesuffix('.base_layer')}.weight"
            rows, columns = layer.out_features, layer.in_features
            if name not in weights.names or weights.shape(name) != (rows, columns):
                raise ValueError(f"{folder}: has no {name} of shape {(rows, columns)}")
            step = max(1, min(rows, -(-rows * columns // sample)))
            restored = layer.dequantize(torch.float32)[::step]
            weight = weights.read(name)[::step].to(restored.device, torch.float32)
            squares += _sum_of_squares(weight)
            errors += _sum_of_squares(restored - weight)
            layers += 1
            measured += weight.numel()
            total += rows * columns
    return BaseError((errors / squares) ** 0.5 if squares else 0.0, layers, measured, total)


def _sum_of_squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64) ** 2)
