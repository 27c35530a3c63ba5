"""LLM.int8() on CUDA: rows quantized in one launch, the product on the int8 tensor cores, one launch to scale it.

The numbers are the reference's; only sums of outlier products are rounded in another order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.int8.reference import RANGE
from halfbyte.kernels.triton_launch import Launcher

_MAX_ROW_TILE = 16384  # a row up to this length is read once, a longer one twice
# cuBLAS takes int8 products only of more than 16 rows, with both other sides multiples of 8.
_LEAST_ROWS = 17
_ALIGNMENT = 8
_SCALE_TILE = 1024

_ROUND = tl.constexpr(1.5 * 2**23)  # added and subtracted, it rounds a float32 below 2**22 half to even


@triton.jit
def _larger(a, b):
    """The larger of two, or NaN where either is: `tl.maximum` and `tl.max` alone drop NaN."""
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
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE)
    largest = tl.zeros((TILE,), tl.float32)
    for start in range(0, columns, TILE):
        column = start + lane
        inside = column < columns
        value = tl.load(values + row * columns + column, mask=inside, other=0.0).to(tl.float16)
        magnitude = tl.abs(value.to(tl.float32))
        if OUTLIERS:
            outlier = magnitude >= threshold
            # Every row that finds one writes the same byte.
            tl.store(outlier_columns + column, tl.full((TILE,), 1, tl.uint8), mask=outlier & inside)
            magnitude = tl.where(outlier, 0.0, magnitude)
        largest = _larger(largest, magnitude)
    row_absmax = tl.reduce(largest, 0, _larger)
    tl.store(absmax + row, row_absmax)
    factor = tl.where(row_absmax > 0, tl.div_rn(1.0, row_absmax) * 127.0, 0.0)
    # A row that is not finite has no codes, and NaN no integer: its scale alone makes its outputs NaN.
    scalable = factor > 0
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
    # Rows on the first axis: CUDA ends the others at 65,535.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < columns
    scale = tl.load(row_absmax + row) * tl.load(absmax + column, mask=inside, other=0.0)
    value = tl.load(product + row * columns + column, mask=inside, other=0).to(tl.float32)
    value *= scale * (1.0 / 16129.0)
    if OUTLIERS:
        value += tl.load(outlier_part + row * columns + column, mask=inside, other=0.0)
    if BIAS:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=inside)


_launch_quantize = Launcher(_quantize_rows_kernel, enable_fp_fusion=False)
_launch_scale = Launcher(_scale_kernel, num_warps=4, enable_fp_fusion=False)


def _quantize(values: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """(int8 rows, row absmax, outlier mark of each column)."""
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
    """`int8_reference.quantize_rows` in one launch."""
    quantized, absmax, _ = _quantize(values, 0.0)
    return quantized, absmax


def quantize_activations(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """`int8_reference.quantize_activations`; with a threshold it waits for the device to count the columns."""
    quantized, absmax, outlier = _quantize(x, threshold)
    if threshold <= 0:
        return quantized, absmax, torch.empty(0, dtype=torch.int64, device=x.device)
    columns = outlier.nonzero().view(-1)
    if columns.numel():
        quantized[:, columns] = 0
    return quantized, absmax, columns


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """`int8_reference.multiply` on the int8 tensor cores, padded to what cuBLAS takes."""
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
    """`int8_reference.linear_int8`."""
    rows, row_absmax, columns = quantize_activations(x, threshold)
    product = multiply(rows, quantized)
    outputs = quantized.shape[0]
    out = torch.empty((x.shape[0], outputs), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    outlier_part = row_absmax
    if columns.numel():
        weight = quantized[:, columns].float() * (absmax * (1.0 / RANGE))[:, None]
        # The weight is rounded as the reference rounds it; the few products are summed in fp32.
        outlier_part = x[:, columns].float() @ weight.to(x.dtype).float().t()
    addend = row_absmax if bias is None else bias
    _launch_scale(
        (x.shape[0], triton.cdiv(outputs, _SCALE_TILE), 1),
        (product, row_absmax, absmax, outlier_part, addend, out, outputs),
        (_SCALE_TILE, columns.numel() > 0, bias is not None),
    )
    return out
