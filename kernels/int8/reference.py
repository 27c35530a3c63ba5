"""LLM.int8() in plain torch: the definition that the kernels are tested against.

From Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale"
(arXiv:2208.07339), with bitsandbytes' order of roundings. Rows of weights and of activations are
scaled by their absmax to -127..127 and multiplied in int32. Activation columns that contain an
outlier are multiplied separately in higher precision.
"""

from collections.abc import Callable

import torch
from torch import Tensor

RANGE = 127.0


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes values (R, C) of any float dtype to int8 (R, C) and fp32 row absmax (R,); zeros stay zeros.

    The format converts the values to fp16 first, so it cannot hold weights beyond +-65504.
    """
    half = values.to(torch.float16).contiguous().float()
    absmax = half.abs().amax(dim=1)
    return _scaled(half, absmax), absmax


def _scaled(half: Tensor, absmax: Tensor) -> Tensor:
    # Reciprocal and product are rounded separately, as in bitsandbytes. A division would
    # round 2 codes in 10,000 differently. An fp16 absmax is zero or at least 2**-24, so
    # every reciprocal that is used is finite.
    factor = torch.where(absmax > 0, absmax.reciprocal() * RANGE, 0.0)[:, None]
    # A row with NaN or infinity gets codes of 0, because NaN has no integer value. Its absmax is NaN or
    # infinite, which already makes the row's outputs NaN.
    return torch.where(factor > 0, torch.round(half * factor), 0.0).to(torch.int8)


def dequantize_rows(quantized: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns int8 (R, C) times fp32 row absmax (R,) / 127, computed in fp32 and rounded once to `dtype`."""
    return (quantized.float() * (absmax * (1.0 / RANGE))[:, None]).to(dtype)


def quantize_activations(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes x (M, K) to (int8 (M, K), fp32 row absmax (M,), outlier columns int64 (C,)).

    A column is an outlier if any |x| in it, in fp16, reaches the threshold. Threshold 0 means no outliers.
    Outlier values do not count for their row's absmax, and outlier columns are zero in the int8 result.
    """
    if threshold <= 0:
        quantized, absmax = quantize_rows(x)
        return quantized, absmax, torch.empty(0, dtype=torch.int64, device=x.device)
    half = x.to(torch.float16).float()
    outlier = half.abs() >= threshold
    kept = half.masked_fill(outlier, 0.0)
    absmax = kept.abs().amax(dim=1)
    column = outlier.any(dim=0)
    quantized = _scaled(kept, absmax).masked_fill(column, 0)
    return quantized, absmax, column.nonzero().view(-1)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Returns int8 (M, K) times int8 (N, K) transposed: int32 (M, N), exact."""
    # fp64 is exact: 127 * 127 * K stays below 2**53 for every realistic K. fp32 is exact only up to K = 1040.
    return (a.double() @ b.double().t()).to(torch.int32)


def linear_int8(
    x: Tensor,
    quantized: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    threshold: float,
    multiply: Callable[[Tensor, Tensor], Tensor] = multiply,
) -> Tensor:
    """Returns x (M, K) times the dequantized weight (N, K) transposed, plus bias (N,): (M, N) in x's dtype.

    y = (x_int8 w_int8^T) * absmax_x absmax_w / 127^2 + (outlier columns of
    x) (the same columns of w)^T + bias

    `multiply` computes the exact int8 product.
    """
    rows, row_absmax, columns = quantize_activations(x, threshold)
    scale = row_absmax[:, None] * absmax[None, :] * (1.0 / RANGE**2)
    y = multiply(rows, quantized).float() * scale
    if columns.numel():
        outliers = dequantize_rows(quantized[:, columns], absmax, x.dtype)
        y = y + x[:, columns].float() @ outliers.float().t()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def linear_int8_input_grad(grad: Tensor, quantized: Tensor, absmax: Tensor) -> Tensor:
    """Returns grad (M, N) times the dequantized weight (N, K): (M, K) in grad's dtype.

    Treats the quantization of the activations as the identity
    (straight-through), as LLM.int8() does in training.
    """
    return grad @ dequantize_rows(quantized, absmax, grad.dtype)
