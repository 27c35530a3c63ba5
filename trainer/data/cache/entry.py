"""One entry of the encoding cache: a safetensors file with a checksum, which is verified whenever it is read."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from halfbyte.quant.files.atomic import write_file
from halfbyte.quant.files.regular import read_regular
from halfbyte.trainer.errors import DataError, DiskError

_ENTRY_BYTES = 2**32  # far above any entry
_CHECKSUM = "crc32"


class DamagedEntry(ValueError):
    """An entry is not what was written. The text says how."""


def read_entry(
    path: Path, shapes: Mapping[str, Sequence[int | None]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Reads and verifies an entry.

    The file is read rather than mapped, so that the tensors are the bytes that were verified, whatever happens to the
    file later.

    Args:
        shapes: the shape of each tensor that the entry must hold; None accepts any length.

    Raises:
        FileNotFoundError: there is no entry.
        DamagedEntry: the entry cannot be read, or is not what was written.
    """
    try:
        data = read_regular(path, _ENTRY_BYTES)
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedEntry(error.strerror or str(error)) from error
    except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a type that torch lacks
        raise DamagedEntry(str(error)) from error
    if header.get("__metadata__", {}).get(_CHECKSUM) != checksum(tensors):
        raise DamagedEntry("its checksum does not match")
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


def write_entry(path: Path, tensors: Mapping[str, Tensor], maker: str) -> None:
    """Writes an entry atomically.

    Raises:
        DataError: a tensor is not finite.
        DiskError: the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise DataError(f"{maker} produced NaN or infinity in {name}; run it in bfloat16 or float32")
    data = save(tensors, metadata={_CHECKSUM: checksum(tensors)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, data)
    except OSError as error:
        raise DiskError(
            f"data.cache_dir: cannot write the cache entry {path}: {error.strerror}; free space, or set"
            " data.cache_dir to a folder on a larger disk"
        ) from error


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Returns the CRC-32 of all tensors in the order of their names.

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
