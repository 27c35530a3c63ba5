"""The content of one entry of the encoding cache: named tensors, checked whenever they are read."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from halfbyte.quant.files.regular import read_regular
from halfbyte.trainer.errors import DataError

Shapes = Mapping[str, Sequence[int | None]]
"""The shape of each tensor of an entry; None: any length."""

_ENTRY_BYTES = 2**32  # far above any entry
_CHECKSUM = "crc32"


class DamagedEntry(ValueError):
    """An entry is not what was written. The text says how."""


def packed(tensors: Mapping[str, Tensor], maker: str) -> bytes:
    """Returns the tensors as safetensors bytes. Raises DataError, which begins with `maker`, if one is not finite."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise DataError(f"{maker} produced NaN or infinity in {name}; run it in bfloat16 or float32")
    return save(tensors)


def unpacked(data: bytes, shapes: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the tensors of an entry.

    Args:
        shapes: the shape of each tensor that the entry must hold.

    Raises:
        DamagedEntry: these are not such tensors, or not finite ones.
    """
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a type that torch lacks
        raise DamagedEntry(str(error)) from error
    if set(tensors) != set(shapes):
        raise DamagedEntry(f"it holds {', '.join(sorted(tensors))}")
    for name, tensor in tensors.items():
        wanted, found = shapes[name], tuple(tensor.shape)
        fits = len(wanted) == len(found) and all(
            length in (None, other) for length, other in zip(wanted, found, strict=True)
        )
        if not fits or tensor.dtype != dtype:
            raise DamagedEntry(f"{name} has the shape {found} in {tensor.dtype}")
        if not is_finite(tensor):
            raise DamagedEntry(f"{name} holds NaN or infinity")
    return tensors


def read_entry_file(path: Path, shapes: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
    """Reads and verifies an entry of older versions, which is a file of its own; see `unpacked`.

    The file is read rather than mapped, so that the tensors are the bytes that were verified, whatever happens to the
    file later.

    Raises:
        OSError: the file cannot be read.
        DamagedEntry: the entry is not what was written.
    """
    data = read_regular(path, _ENTRY_BYTES)
    tensors = unpacked(data, shapes, dtype)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    if header.get("__metadata__", {}).get(_CHECKSUM) != checksum(tensors):
        raise DamagedEntry("its checksum does not match")
    return tensors


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Returns the CRC-32 of all tensors in the order of their names, as entries of older versions have it.

    safetensors notices a truncated file, but not a changed byte.
    """
    value = 0
    for name in sorted(tensors):
        raw = tensors[name].contiguous().flatten().view(torch.uint8).numpy()
        value = zlib.crc32(raw.data, value)
    return f"{value:08x}"


def is_finite(tensor: Tensor) -> bool:
    """Returns True if no value is NaN or infinite. aminmax passes NaN on, and takes a tenth of isfinite's time."""
    return tensor.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))
