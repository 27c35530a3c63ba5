"""Checks dtype, size and layout of the operands of the 4-bit ops, before a kernel reads them.

Kernels compute addresses from the sizes that are passed to them. They would read past the end of an operand
that is too short, and torch would broadcast it to a wrong weight. The checks run at every call. They compare
plain integers and launch nothing; on symbolic sizes they become guards.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.kernels.quantize_4bit import reference
from halfbyte.kernels.rows import WEIGHT_DTYPES, check_tensor

QUANT_TYPES = tuple(reference.CODES)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def check_quantize(
    weight: Tensor, quant_type: str, blocksize: int, nested_blocksize: int = BLOCKSIZES[0]
) -> None:
    """Checks the operands of `quantize_4bit` and `quantize_4bit_double`.

    Raises:
        ValueError: with the name of the argument that does not fit.
    """
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type: got {quant_type!r}, accepted: {', '.join(QUANT_TYPES)}")
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight: got {weight.dtype}, accepted: {', '.join(map(str, WEIGHT_DTYPES))}")
    if weight.numel() == 0:
        raise ValueError(f"weight: got the empty shape {tuple(weight.shape)}, expected at least one value")
    _check_blocksize("blocksize", blocksize)
    _check_blocksize("nested_blocksize", nested_blocksize)


def check_dequantize(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    scale_dtype: torch.dtype = torch.float32,
) -> None:
    """Checks the operands of `dequantize_4bit`, whose absmax has `scale_dtype`.

    Raises:
        ValueError: with the name of the argument that does not fit.
    """
    numel = 1
    for size in shape:
        if size < 1:
            raise ValueError(f"shape: got {tuple(shape)}, expected positive sizes")
        numel *= size
    _check_blocksize("blocksize", blocksize)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: got {dtype}, expected a floating-point type")
    device = packed.get_device()
    check_tensor("packed", packed, torch.uint8, (numel + 1) // 2, device)
    check_tensor("absmax", absmax, scale_dtype, (numel + blocksize - 1) // blocksize, device)
    check_tensor("code", code, torch.float32, 16, device)


def check_dequantize_double(
    packed: Tensor,
    codes: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    code: Tensor,
    nested_code: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    nested_blocksize: int,
) -> None:
    """Checks the operands of `dequantize_4bit_double`. Errors call its `codes` absmax, like a `PackedWeight`.

    Raises:
        ValueError: with the name of the argument that does not fit.
    """
    check_dequantize(packed, codes, code, shape, dtype, blocksize, torch.uint8)
    _check_blocksize("nested_blocksize", nested_blocksize)
    device = packed.get_device()
    blocks = (codes.numel() + nested_blocksize - 1) // nested_blocksize
    check_tensor("nested_absmax", nested_absmax, torch.float32, blocks, device)
    check_tensor("offset", offset, torch.float32, 1, device)
    check_tensor("nested_code", nested_code, torch.float32, 256, device)


def _check_blocksize(name: str, blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"{name}: got {blocksize}, accepted: {', '.join(map(str, BLOCKSIZES))}")
