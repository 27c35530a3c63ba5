"""Measures how far a quantized model's weights are from the full-precision weights."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.fill import Finish

SAMPLE = 500_000
_PIECES = 4  # row ranges per layer; few, because every range costs a disk seek


@dataclass(frozen=True)
class BaseError:
    """The error over all quantized layers together."""

    relative: float  # relative RMS error, |restored - weight| / |weight|
    layers: int
    measured: int  # number of weights compared
    weights: int  # number of weights in the quantized layers


def base_error(
    model: nn.Module, weights: ShardedWeights, *, finish: Finish | None = None, sample: int = SAMPLE
) -> BaseError:
    """Compares the model's dequantized layers with the full-precision `weights`; ignores adapters.

    finish: see `fill`.
    sample: about how many weights to compare in each layer, in four evenly spread ranges of whole rows.

    Raises ValueError where a layer's weight is not among `weights`.
    """
    squares = errors = 0.0
    layers = measured = total = 0
    known = set(weights.names)
    for path, layer in model.named_modules():
        if not isinstance(layer, QuantizedLayer):
            continue
        name = f"{path.removesuffix('.base_layer')}.weight"
        rows, columns = layer.out_features, layer.in_features
        if name not in known or weights.shape(name) != (rows, columns):
            raise ValueError(f"{weights.folder}: no {name} of shape {(rows, columns)}")
        pieces = _pieces(rows, sample // columns)
        restored = _rows(layer.dequantize(torch.float32), pieces)
        read = weights.read(name) if finish is None else finish(name, weights.read(name))
        weight = _rows(read, pieces).to(restored.device, torch.float32)
        squares += _sum_of_squares(weight)
        errors += _sum_of_squares(restored - weight)
        layers += 1
        measured += weight.numel()
        total += rows * columns
    return BaseError((errors / squares) ** 0.5 if squares else 0.0, layers, measured, total)


def _pieces(rows: int, wanted: int) -> list[slice]:
    """Returns evenly spread ranges from the first row to the last, with about `wanted` rows in total."""
    if rows <= max(wanted, _PIECES):
        return [slice(0, rows)]
    count = max(1, wanted // _PIECES)
    starts = (piece * (rows - count) // (_PIECES - 1) for piece in range(_PIECES))
    return [slice(start, start + count) for start in starts]


def _rows(weight: Tensor, pieces: list[slice]) -> Tensor:
    return torch.cat([weight[piece] for piece in pieces])


def _sum_of_squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64) ** 2)
