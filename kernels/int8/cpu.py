"""LLM.int8() on CPU: the reference, with its product in int8 where the processor multiplies int8 exactly."""

import functools

import torch
from torch import Tensor

from halfbyte.kernels.int8 import reference as int8_reference

quantize_rows = int8_reference.quantize_rows

# torch gives garbage for a single column (2.13).
_LEAST_WIDTH = 2


def _int8_product(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[1] < _LEAST_WIDTH:
        a, b = (torch.nn.functional.pad(side, (0, _LEAST_WIDTH - a.shape[1])) for side in (a, b))
    return torch._int_mm(a.contiguous(), b.contiguous().t())


@functools.cache
def multiplies_exactly() -> bool:
    """Whether torch's int8 product is exact here; tried once.

    Without VNNI instructions oneDNN sums pairs of products in 16 bits, and what does not fit is cut off.
    """
    a = torch.tensor([[127, -128, 127], [-128, -128, 1]], dtype=torch.int8).repeat(32, 100)  # (64, 300)
    return all(
        torch.equal(_int8_product(left, right), int8_reference.multiply(left, right))
        for left in (a, a[:1])
        for right in (a, -a)
    )


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """`int8_reference.multiply`."""
    return _int8_product(a, b) if multiplies_exactly() else int8_reference.multiply(a, b)


def linear_int8(
    x: Tensor, quantized: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """`int8_reference.linear_int8`, bit for bit."""
    return int8_reference.linear_int8(x, quantized, absmax, bias, threshold, multiply)
