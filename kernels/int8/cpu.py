"""LLM.int8() on CPU: the reference, with torch's int8 product if it is exact on this processor."""

import functools

import torch
from torch import Tensor

from halfbyte.kernels.int8 import reference

quantize_rows = reference.quantize_rows

# torch 2.13 returns garbage for matrices with a single column.
_LEAST_WIDTH = 2


def _int8_product(a: Tensor, b: Tensor) -> Tensor:
    """Returns a (M, K) times b (N, K) transposed in int32, as exact as oneDNN is on this processor."""
    if a.shape[1] < _LEAST_WIDTH:
        a, b = (torch.nn.functional.pad(side, (0, _LEAST_WIDTH - a.shape[1])) for side in (a, b))
    return torch._int_mm(a.contiguous(), b.contiguous().t())


@functools.cache
def multiplies_exactly() -> bool:
    """Returns True if torch's int8 product is exact on this processor; tested once.

    Without VNNI instructions oneDNN adds pairs of products in 16 bits and saturates.
    """
    a = torch.tensor([[127, -128, 127], [-128, -128, 1]], dtype=torch.int8).repeat(32, 100)  # (64, 300)
    return all(
        torch.equal(_int8_product(left, right), reference.multiply(left, right))
        for left in (a, a[:1])
        for right in (a, -a)
    )


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Computes `halfbyte.kernels.int8.reference.multiply`, with int8 instructions if they are exact."""
    return _int8_product(a, b) if multiplies_exactly() else reference.multiply(a, b)


def linear_int8(
    x: Tensor, quantized: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """Computes `halfbyte.kernels.int8.reference.linear_int8`, bitwise identical."""
    return reference.linear_int8(x, quantized, absmax, bias, threshold, multiply)
