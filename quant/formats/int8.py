"""LLM.int8() weights: int8 rows with one scale each, and how bitsandbytes files hold them.

For a layer at `P` a file has `P.weight` int8 (N, K), `P.SCB` fp32 (N,), the largest magnitude of each row, and
`P.weight_format`, a uint8 scalar that says how the rows lie in memory. A weight is `q * SCB / 127`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.kernels.int8 import ops as int8_ops
from halfbyte.kernels.rows import WEIGHT_DTYPES
from halfbyte.quant.formats.nf4 import BeyondFormatError

DEFAULT_THRESHOLD = 6.0  # the paper's, and bitsandbytes' own
STATISTICS = ("SCB", "weight_format")
# Files of bitsandbytes before 0.43 may hold layouts of old GPUs instead, numbered from 1.
_ROW_MAJOR = 0


def quantize(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """A weight (N, K) on its own device -> (int8 (N, K), SCB fp32 (N,)).

    Raises ValueError, naming the tensor by `name`, where it is not a matrix, empty, not fp32, fp16 or bf16, or not
    finite, and BeyondFormatError beyond fp16, which the format passes it through.
    """
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name}: cannot quantize {weight.dtype}; accepted: float32, float16, bfloat16")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"{name}: expected a matrix (out, in), got shape {tuple(weight.shape)}")
    weight = weight.detach().contiguous()
    # aminmax is one pass without a temporary, and passes NaN on.
    largest = torch.stack(torch.aminmax(weight)).abs().max()
    if not largest.isfinite():
        raise ValueError(f"{name}: the weight holds NaN or infinite values; the checkpoint is damaged")
    if largest > torch.finfo(torch.float16).max:
        raise BeyondFormatError(
            f"{name}: holds {float(largest):g}, and int8 passes weights through fp16, which ends at 65504; skip the"
            " layer, or choose nf4 or fp4"
        )
    return int8_ops.quantize_int8(weight)


def dequantize(quantized: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) in `dtype`, from int8 (N, K) and SCB fp32 (N,)."""
    return int8_ops.dequantize_int8(quantized, scales, dtype)


def split_key(key: str) -> tuple[str, str] | None:
    """`P.SCB` -> (`P.weight`, `SCB`); None where the key names no statistic."""
    path, _, leaf = key.rpartition(".")
    return (f"{path}.weight", leaf) if path and leaf in STATISTICS else None


def pack_scales(scales: Tensor) -> dict[str, Tensor]:
    """The statistics of a weight by the name they have beside it, ready to be saved."""
    return {"SCB": scales, "weight_format": torch.tensor(_ROW_MAJOR, dtype=torch.uint8)}


def unpack_scales(
    name: str, quantized: Tensor, shape: tuple[int, int], statistics: Mapping[str, Tensor]
) -> Tensor:
    """SCB of the weight called `name`, on the weight's device.

    Raises ValueError, naming the tensor, where it or a statistic is missing, unknown, of the wrong type or size,
    not finite, or laid out for another GPU.
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
        raise ValueError(f"{layer}SCB: missing; without the scales of its rows {name} cannot be read")
    scales = statistics["SCB"]
    if scales.dtype != torch.float32 or tuple(scales.shape) != shape[:1]:
        raise ValueError(
            f"{layer}SCB: expected torch.float32 {shape[:1]}, got {scales.dtype} {tuple(scales.shape)}"
        )
    if not scales.isfinite().all() or (scales < 0).any():
        raise ValueError(f"{layer}SCB: holds NaN, infinite or negative scales; the file is damaged")
    layout = statistics.get("weight_format")
    if layout is not None and (layout.numel() != 1 or layout.item() != _ROW_MAJOR):
        raise ValueError(
            f"{layer}weight_format: got {layout.flatten()[:8].tolist()}, accepted: 0, row by row; save the model"
            " again with a current bitsandbytes"
        )
    return scales.to(quantized.device)
