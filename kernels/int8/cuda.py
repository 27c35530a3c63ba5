"""LLM.int8() on CUDA: a kernel quantizes the rows, int8 tensor cores multiply, a kernel scales the product.

Results equal the reference's, except that outlier products are added in another order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.int8.reference import RANGE
from halfbyte.kernels.triton_launch import Launcher

_MAX_ROW_TILE = 16384  # longer rows take several tiles and are read from memory twice
# cuBLAS multiplies int8 only with more than 16 rows and with K and N multiples of 8.
_LEAST_ROWS = 17
_ALIGNMENT = 8
_SCALE_TILE = 1024

# Adding and subtracting this rounds an fp32 value below 2**22 to an integer, half to even: the sum has no
# bits left for a fraction.
_ROUND = tl.constexpr(1.5 * 2**23)


@triton.jit
def _larger(a, b):
    """Returns the larger of two values, or NaN if either is NaN; plain `tl.maximum` and `tl.max` drop NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _quantize_rows_kernel(
    values,
    quantized,
    absmax,
    outlier_columns,
    columns,
    threshold,
    TILE: tl.constexpr,
    OUTLIERS: tl.constexpr,
):
    """Quantizes one row to int8 and marks the outlier columns. Grid: (rows,).

    factor = 127 / absmax(row without outliers);  quantized = round(value * factor), 0 for outliers
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE)
    # First pass: the row's absmax. Each lane keeps the largest magnitude that it has seen.
    largest = tl.zeros((TILE,), tl.float32)
    for start in range(0, columns, TILE):
        column = start + lane
        inside = column < columns
        value = tl.load(values + row * columns + column, mask=inside, other=0.0).to(tl.float16)
        magnitude = tl.abs(value.to(tl.float32))
        if OUTLIERS:
            outlier = magnitude >= threshold
            # Several programs may mark the same column; all write the same byte, so the race is harmless.
            tl.store(outlier_columns + column, tl.full((TILE,), 1, tl.uint8), mask=outlier & inside)
            magnitude = tl.where(outlier, 0.0, magnitude)
        largest = _larger(largest, magnitude)
    row_absmax = tl.reduce(largest, 0, _larger)
    tl.store(absmax + row, row_absmax)
    factor = tl.where(row_absmax > 0, tl.div_rn(1.0, row_absmax) * 127.0, 0.0)
    # A row with NaN or infinity gets codes of 0, because NaN has no integer value. Its absmax already makes
    # the outputs NaN.
    scalable = factor > 0
    # Second pass: the codes. A row of a single tile comes from the cache.
    for start in range(0, columns, TILE):
        column = start + lane
        inside = column < columns
        value = tl.load(values + row * columns + column, mask=inside, other=0.0)
        value = value.to(tl.float16).to(tl.float32)
        if OUTLIERS:
            value = tl.where(tl.abs(value) >= threshold, 0.0, value)
        scaled = tl.where(scalable, value * factor + _ROUND - _ROUND, 0.0)
        tl.store(quantized + row * columns + column, scaled.to(tl.int8), mask=inside)


@triton.jit
def _scale_kernel(
    product,
    row_absmax,
    absmax,
    outlier_part,
    bias,
    out,
    columns,
    TILE: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Computes out = product * (row_absmax * absmax / 127^2) + outlier_part + bias. Grid: (M, N tiles).

    All arithmetic is fp32; the result is rounded once to out's dtype.
    """
    # Rows are the grid's first axis, because CUDA limits the other axes to 65,535.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < columns
    scale = tl.load(row_absmax + row) * tl.load(absmax + column, mask=inside, other=0.0)
    value = tl.load(product + row * columns + column, mask=inside, other=0).to(tl.float32)
    value *= scale * (1.0 / 16129.0)  # 127^2
    if OUTLIERS:
        value += tl.load(outlier_part + row * columns + column, mask=inside, other=0.0)
    if BIAS:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=inside)


_launch_quantize = Launcher(_quantize_rows_kernel, enable_fp_fusion=False)
_launch_scale = Launcher(_scale_kernel, num_warps=4, enable_fp_fusion=False)


def _quantize(values: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (int8 rows (R, C), fp32 row absmax (R,), uint8 outlier mark of each column (C,)).

    Unlike the reference, it does not zero the other rows' values in outlier columns.
    """
    values = values.contiguous()
    rows, columns = values.shape
    quantized = torch.empty((rows, columns), dtype=torch.int8, device=values.device)
    absmax = torch.empty(rows, dtype=torch.float32, device=values.device)
    outlier = torch.zeros(columns if threshold > 0 else 1, dtype=torch.uint8, device=values.device)
    if values.numel():
        tile = min(triton.next_power_of_2(columns), _MAX_ROW_TILE)
        outliers = threshold > 0
        _launch_quantize(
            (rows, 1, 1),
            (values, quantized, absmax, outlier, columns, float(threshold)),
            (tile, outliers),
            num_warps=4 if tile <= 4096 else 8,
        )
    return quantized, absmax, outlier


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `halfbyte.kernels.int8.reference.quantize_rows` in one launch."""
    quantized, absmax, _ = _quantize(values, 0.0)
    return quantized, absmax


def quantize_activations(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `halfbyte.kernels.int8.reference.quantize_activations`.

    With a threshold it synchronizes with the device, because the number of outlier columns is a shape.
    """
    quantized, absmax, outlier = _quantize(x, threshold)
    if threshold <= 0:
        return quantized, absmax, torch.empty(0, dtype=torch.int64, device=x.device)
    columns = outlier.nonzero().view(-1)
    if columns.numel():
        quantized[:, columns] = 0
    return quantized, absmax, columns


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Computes `halfbyte.kernels.int8.reference.multiply` on tensor cores, padded to shapes cuBLAS accepts."""
    rows, width = a.shape
    outputs = b.shape[0]
    if width % _ALIGNMENT:
        a, b = (torch.nn.functional.pad(side, (0, -width % _ALIGNMENT)) for side in (a, b))
    if outputs % _ALIGNMENT:
        b = torch.nn.functional.pad(b, (0, 0, 0, -outputs % _ALIGNMENT))
    if rows < _LEAST_ROWS:
        a = torch.nn.functional.pad(a, (0, 0, 0, 32 - rows))
    return torch._int_mm(a, b.t())[:rows, :outputs].contiguous()


def linear_int8(
    x: Tensor, quantized: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """Computes `halfbyte.kernels.int8.reference.linear_int8`."""
    rows, row_absmax, columns = quantize_activations(x, threshold)
    product = multiply(rows, quantized)
    outputs = quantized.shape[0]
    out = torch.empty((x.shape[0], outputs), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    outlier_part = row_absmax  # a placeholder without outliers, never read
    if columns.numel():
        weight = quantized[:, columns].float() * (absmax * (1.0 / RANGE))[:, None]
        # Round the weight to x's dtype, as the reference does; add the few products in fp32.
        outlier_part = x[:, columns].float() @ weight.to(x.dtype).float().t()
    addend = row_absmax if bias is None else bias
    _launch_scale(
        (x.shape[0], triton.cdiv(outputs, _SCALE_TILE), 1),
        (product, row_absmax, absmax, outlier_part, addend, out, outputs),
        (_SCALE_TILE, columns.numel() > 0, bias is not None),
    )
    return out
