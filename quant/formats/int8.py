"""Quantizes weights to LLM.int8() and back, and reads and writes the tensors of bitsandbytes files.

Every row has one scale, its absmax, and the weight is `q * SCB / 127`. For a layer at `P`, a file contains:

- `P.weight`, int8 (N, K): q
- `P.SCB`, fp32 (N,): the absmax of each row
- `P.weight_format`, a uint8 scalar: the memory layout of the rows
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.kernels.int8 import ops as int8_ops
from halfbyte.kernels.rows import WEIGHT_DTYPES
from halfbyte.quant.formats.nf4 import BeyondFormatError

DEFAULT_THRESHOLD = 6.0  # as in the paper and in bitsandbytes
STATISTICS = ("SCB", "weight_format")
# Files of bitsandbytes before 0.43 may use the layouts of old GPUs instead, which have numbers from 1.
_ROW_MAJOR = 0


def quantize(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Quantizes a weight (N, K) on its own device; returns int8 (N, K) and SCB fp32 (N,).

    Raises ValueError, naming the tensor by `name`, if it is not a matrix, empty, not fp32, fp16 or bf16, or
    not finite; BeyondFormatError if a value exceeds the range of fp16, to which the format casts weights
    first.
    """
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name}: cannot quantize {weight.dtype}; accepted: float32, float16, bfloat16")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"{name}: expected a matrix (out, in), got shape {tuple(weight.shape)}")
    weight = weight.detach().contiguous()
    # aminmax reads the weight once, allocates no copy of it, and propagates NaN.
    largest = torch.stack(torch.aminmax(weight)).abs().max()
    if not largest.isfinite():
        raise ValueError(f"{name}: the weight contains NaN or infinite values; the checkpoint is damaged")
    if largest > torch.finfo(torch.float16).max:
        raise BeyondFormatError(
            f"{name}: contains {float(largest):g}, but int8 casts weights to fp16, whose largest value is 65504; skip"
            " the layer, or choose nf4 or fp4"
        )
    return int8_ops.quantize_int8(weight)


def dequantize(quantized: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the weight (N, K) in `dtype`, from int8 (N, K) and SCB fp32 (N,)."""
    return int8_ops.dequantize_int8(quantized, scales, dtype)


def split_key(key: str) -> tuple[str, str] | None:
    """Splits `P.SCB` into (`P.weight`, `SCB`); returns None if the key names no statistic."""
    path, _, leaf = key.rpartition(".")
    return (f"{path}.weight", leaf) if path and leaf in STATISTICS else None


def pack_scales(scales: Tensor) -> dict[str, Tensor]:
    """Returns a weight's statistics to save, by their names in the layer."""
    return {"SCB": scales, "weight_format": torch.tensor(_ROW_MAJOR, dtype=torch.uint8)}


def unpack_scales(
    name: str, quantized: Tensor, shape: tuple[int, int], statistics: Mapping[str, Tensor]
) -> Tensor:
    """Checks the statistics of the weight called `name`; returns its SCB on the weight's device.

    Raises ValueError, naming the tensor, if it or a statistic is missing, unknown, of the wrong dtype or
    shape, not finite, or in a memory layout other than row-major.
    """
    unknown = sorted(set(statistics) - set(STATISTICS))
    if unknown:
        raise ValueError(f"{name}: unknown statistic {unknown[0]}; accepted: {', '.join(STATISTICS)}")
    if quantized.dtype != torch.int8 or tuple(quantized.shape) != shape:
        raise ValueError(
            f"{name}: expected torch.int8 {shape}, got {quantized.dtype} {tuple(quantized.shape)}"
        )
    layer = name.removesuffix("weight")
    if "SCB" not in statistics:
        raise ValueError(f"{layer}SCB: missing; these scales of the rows are needed to read {name}")
    scales = statistics["SCB"]
    if scales.dtype != torch.float32 or tuple(scales.shape) != shape[:1]:
        raise ValueError(
            f"{layer}SCB: expected torch.float32 {shape[:1]}, got {scales.dtype} {tuple(scales.shape)}"
        )
    if not scales.isfinite().all() or (scales < 0).any():
        raise ValueError(f"{layer}SCB: contains NaN, infinite or negative scales; the file is damaged")
    layout = statistics.get("weight_format")
    if layout is not None and (layout.numel() != 1 or layout.item() != _ROW_MAJOR):
        raise ValueError(
            f"{layer}weight_format: got {layout.flatten()[:8].tolist()}, accepted: 0 (row-major); save the model again"
            " with a current bitsandbytes"
        )
    return scales.to(quantized.device)
