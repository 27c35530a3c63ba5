"""Measures the relative error and the size of a weight under each quantization scheme."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.quant.formats import int8, nf4


@dataclass(frozen=True)
class Scheme:
    """A quantization scheme."""

    name: str
    restore: Callable[
        [Tensor, str], Tensor
    ]  # (weight (N, K), its name) -> quantized and restored, (N, K) fp32
    nbytes: Callable[[int, int], int]  # (N, K) -> bytes on the device


def _blocks(count: int, size: int) -> int:
    return (count + size - 1) // size


def _four_bit(name: str, spec: nf4.QuantSpec) -> Scheme:
    def restore(weight: Tensor, tensor: str) -> Tensor:
        return nf4.dequantize(*nf4.quantize(weight, spec, tensor), torch.float32)

    def nbytes(rows: int, columns: int) -> int:
        scales = _blocks(rows * columns, spec.blocksize)
        # 4-bit codes, 8-bit scales, the scales of the scales with their offset, and the two tables.
        nested = 4 * (_blocks(scales, nf4.NESTED_BLOCKSIZE) + 1)
        return _blocks(rows * columns, 2) + scales + nested + 4 * (16 + 256)

    return Scheme(name, restore, nbytes)


def _restore_int8(weight: Tensor, tensor: str) -> Tensor:
    return int8.dequantize(*int8.quantize(weight, tensor), torch.float32)


SCHEMES = (
    _four_bit("nf4", nf4.QuantSpec("nf4")),
    _four_bit("nf4 mse", nf4.QuantSpec("nf4", scale_search="mse")),
    _four_bit("fp4", nf4.QuantSpec("fp4")),
    Scheme("int8", _restore_int8, lambda rows, columns: rows * columns + 4 * rows),
)


@dataclass(frozen=True)
class WeightError:
    """The squared error of each scheme, summed over elements; adding two gives the sum over both layers."""

    squares: float  # sum of the squared weights
    squared_errors: tuple[float | None, ...]
    """In the order of SCHEMES; None if a weight exceeds the range of the scheme."""

    def relative(self) -> tuple[float | None, ...]:
        """Returns each scheme's relative RMS error, |restored - weight| / |weight|; 0 for zeros."""
        squares = self.squares or 1.0
        return tuple(
            None if error is None else float((error / squares) ** 0.5) for error in self.squared_errors
        )

    def __add__(self, other: "WeightError") -> "WeightError":
        errors = zip(self.squared_errors, other.squared_errors, strict=True)
        return WeightError(
            self.squares + other.squares, tuple(None if a is None or b is None else a + b for a, b in errors)
        )


def weight_error(weight: Tensor, name: str) -> WeightError:
    """Measures a weight (N, K) in fp32, fp16 or bf16 on its device.

    Raises ValueError, naming it, if it cannot be quantized, for example because it is not finite.
    """
    errors = tuple(_squared_error(weight, scheme, name) for scheme in SCHEMES)
    return WeightError(_sum_of_squares(weight), errors)


def _squared_error(weight: Tensor, scheme: Scheme, name: str) -> float | None:
    try:
        return _sum_of_squares(scheme.restore(weight, name).sub_(weight))
    except nf4.BeyondFormatError:
        return None


def _sum_of_squares(tensor: Tensor) -> float:
    # A sum of a hundred million squares in fp32 loses the digits in which the schemes differ.
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64) ** 2)
