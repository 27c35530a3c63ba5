"""LLM.int8() in plain torch: the definition the kernels are tested against.

After Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale" (arXiv:2208.07339), in
bitsandbytes' order of roundings: rows of weights and of activations are scaled by their largest magnitude to
-127..127, multiplied in int32, and the activation columns that hold an outlier are multiplied apart.
"""

from collections.abc import Callable

import torch
from torch import Tensor

RANGE = 127.0


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """values (R, C) of any float dtype -> (int8 (R, C), fp32 row absmax (R,)); a row of zeros gives zeros.

    The values pass through fp16, as the format says, so weights beyond 65504 do not fit it.
    """
    half = values.to(torch.float16).contiguous().float()
    absmax = half.abs().amax(dim=1)
    return _scaled(half, absmax), absmax


def _scaled(half: Tensor, absmax: Tensor) -> Tensor:
    # A reciprocal and a product, rounded one by one: a division rounds 2 codes in 10,000 differently. An fp16
    # row is zero or at least 2**-24, so the reciprocal is finite wherever it is used.
    factor = torch.where(absmax > 0, absmax.reciprocal() * RANGE, 0.0)[:, None]
    # A row that is not finite has no codes, and NaN no integer: its scale alone makes its outputs NaN.
    return torch.where(factor > 0, torch.round(half * factor), 0.0).to(torch.int8)


def dequantize_rows(quantized: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 (R, C) and fp32 (R,) -> (R, C): q * (absmax / 127) in fp32, one rounding to `dtype`."""
    return (quantized.float() * (absmax * (1.0 / RANGE))[:, None]).to(dtype)


def quantize_activations(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, K) -> (int8 (M, K), fp32 row absmax (M,), outlier columns int64 (C,)).

    A column is an outlier where any |x| in it, in fp16, reaches the threshold; 0 means no outliers. Outlier
    values do not count towards the row's absmax, and outlier columns are zeros in the int8 result.
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
    """int8 (M, K) times int8 (N, K) transposed -> int32 (M, N), exact."""
    # 127 * 127 * K stays below 2**53 for any K there is; fp32 would be exact only up to K = 1040.
    return (a.double() @ b.double().t()).to(torch.int32)


def linear_int8(
    x: Tensor,
    quantized: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    threshold: float,
    multiply: Callable[[Tensor, Tensor], Tensor] = multiply,
) -> Tensor:
    """x (M, K) times the dequantized weight (N, K) transposed, plus bias (N,): (M, N) in x's dtype."""
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
    """grad (M, N) times the dequantized weight (N, K): (M, K) in grad's dtype.

    The rounding of the activations is passed through as the identity, as LLM.int8() trains.
    """
    return grad @ dequantize_rows(quantized, absmax, grad.dtype)
