"""How far a quantized model is from the weights that it was made of, measured on its layers as they stand."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.quant.layers.quantized_layer import QuantizedLayer
from halfbyte.quant.load.fill import Finish

SAMPLE = 500_000
_PIECES = 4  # of a layer: few enough that a disk finds them fast


@dataclass(frozen=True)
class BaseError:
    """Over all quantized layers together."""

    relative: float  # RMS: |restored - weight| / |weight|
    layers: int
    measured: int  # weights that were compared
    weights: int  # of the quantized layers


def base_error(
    model: nn.Module, weights: ShardedWeights, *, finish: Finish | None = None, sample: int = SAMPLE
) -> BaseError:
    """Compares with the weights that the model was quantized from, in full precision; adapters are left out.

    finish: as for `fill`. sample: weights compared a layer, about, in four runs of whole rows spread evenly. Raises
    ValueError where a layer's weight is not among the weights.
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
            raise ValueError(f"{weights.folder}: has no {name} of shape {(rows, columns)}")
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
    """Runs of rows, about as many rows as wanted, from the first to the last."""
    if rows <= max(wanted, _PIECES):
        return [slice(0, rows)]
    length = max(1, wanted // _PIECES)
    starts = (piece * (rows - length) // (_PIECES - 1) for piece in range(_PIECES))
    return [slice(start, start + length) for start in starts]


def _rows(weight: Tensor, pieces: list[slice]) -> Tensor:
    return torch.cat([weight[piece] for piece in pieces])


def _sum_of_squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64) ** 2)
