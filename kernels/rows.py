"""Operand checks shared by several ops."""

import torch
from torch import Tensor

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_rows(name: str, rows: Tensor, width: int, bias: Tensor | None = None, outputs: int = 0) -> None:
    """Checks the rows (..., width) that a weight is multiplied with, and the bias (outputs,) to add.

    Raises:
        ValueError: with the name of the argument that does not fit.
    """
    if rows.dim() == 0 or rows.shape[-1] != width:
        raise ValueError(f"{name}: got shape {tuple(rows.shape)}, expected (..., {width})")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != outputs or not bias.is_contiguous()):
        raise ValueError(
            f"bias: got shape {tuple(bias.shape)} with strides {bias.stride()},"
            f" expected a contiguous ({outputs},)"
        )


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, numel: int, device: int) -> None:
    """Checks dtype, number of elements, contiguity and CUDA device index (-1: any) of an operand.

    Raises:
        ValueError: with the name of the operand and all that it has and should have.
    """
    # `get_device` is -1 for CPU and meta tensors. torch itself refuses to mix those with other devices.
    if (
        tensor.dtype is not dtype
        or tensor.numel() != numel
        or not tensor.is_contiguous()
        or (device >= 0 and tensor.get_device() != device)
    ):
        layout = "" if tensor.is_contiguous() else f" with strides {tensor.stride()}"
        raise ValueError(
            f"{name}: got {tensor.dtype} {tuple(tensor.shape)}{layout} on {tensor.device}, expected a"
            f" contiguous tensor of {numel} {dtype} values on the same device as the other operands"
        )
