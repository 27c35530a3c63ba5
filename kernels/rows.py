"""Checks of operands that the ops share."""

import torch
from torch import Tensor

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_rows(name: str, rows: Tensor, width: int, bias: Tensor | None = None, outputs: int = 0) -> None:
    """What a weight is multiplied by, (..., width), and the bias (outputs,) that is added.

    Raises:
        ValueError: naming the argument, or "bias".
    """
    if rows.dim() == 0 or rows.shape[-1] != width:
        raise ValueError(f"{name}: got shape {tuple(rows.shape)}, expected (..., {width})")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != outputs or not bias.is_contiguous()):
        raise ValueError(
            f"bias: got shape {tuple(bias.shape)} with strides {bias.stride()}, expected ({outputs},) contiguous"
        )


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, numel: int, device: int) -> None:
    # Tensors of the CPU and of meta have no number; there torch itself refuses to mix them.
    if (
        tensor.dtype is not dtype
        or tensor.numel() != numel
        or not tensor.is_contiguous()
        or (device >= 0 and tensor.get_device() != device)
    ):
        layout = "" if tensor.is_contiguous() else f" with strides {tensor.stride()}"
        raise ValueError(
            f"{name}: got {tensor.dtype} {tuple(tensor.shape)}{layout} on {tensor.device}, expected {numel} values of"
            f" {dtype}, contiguous and on the device of the other operands"
        )
