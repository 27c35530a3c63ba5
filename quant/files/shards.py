"""Reads and writes a model's safetensors weights: one file, or several shards with an index."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from halfbyte.quant.files.atomic import write_file
from halfbyte.quant.files.json_object import LFS_POINTER, is_lfs_pointer, read_object

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = "diffusion_pytorch_model.safetensors.index.json"
# The name that transformers uses.
TEXT_WEIGHTS_FILE = "model.safetensors"
SHRUNK = "the file became shorter during reading; is another process writing it?"
# Weights in pickled files, which this reader rejects: loading a pickle runs the code in it.
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# The order in which safetensors stores tensors in a file: the widest dtype first, which aligns every tensor.
_DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """The location, dtype and shape of a tensor, from the header of its file."""

    shard: str
    start: int  # first byte in the file
    stop: int  # byte after the last
    dtype: torch.dtype
    shape: tuple[int, ...]


class ShardedWeights:
    """The tensors of a folder, by name. Opening reads only the headers; `read` loads a tensor."""

    def __init__(self, folder: Path, weights_file: str = WEIGHTS_FILE) -> None:
        """Opens all shards of the folder.

        weights_file: the file's name where all weights are in one file; an index has this name plus
        `.index.json`.

        Raises ValueError, naming the file, where weights or shards are missing or damaged.
        """
        self.folder = folder
        self._weights_file = weights_file
        self._index_file = f"{weights_file}.index.json"
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._stored: dict[str, Stored] = {}
        self._shard_of = self._find()

    def __enter__(self) -> "ShardedWeights":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """The tensor names in the order of shards and bytes, in which every file is read sequentially."""
        return sorted(self._shard_of, key=lambda name: (self._shard_of[name], self._stored[name].start, name))

    @property
    def files(self) -> tuple[Path, ...]:
        """The paths of the files with tensors, in order."""
        return tuple(self.folder / shard for shard in sorted(self._files))

    @property
    def index(self) -> Path | None:
        """The path of the index, which maps tensors to shards; None where all tensors are in one file."""
        index = self.folder / self._index_file
        return index if index.is_file() else None

    def stored(self, name: str) -> Stored:
        """Returns a tensor's location, dtype and shape."""
        return self._stored[name]

    def path(self, name: str) -> Path:
        """Returns the path of the file with the tensor."""
        return self.folder / self._shard_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor without reading its values."""
        return self._stored[name].shape

    def read(self, name: str) -> Tensor:
        """Reads a tensor to the CPU.

        It is not memory-mapped: the values would change with the file, and a file that is cut would end the
        process with a bus error. Raises ValueError, naming the file, where that happens during the read.
        """
        stored, path = self._stored[name], self.path(name)
        data = torch.empty(stored.stop - stored.start, dtype=torch.uint8)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(stored.start)
                view = data.numpy().data
                while view and (count := file.readinto(view)):
                    view = view[count:]
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
        if view:
            raise ValueError(f"{path}: {SHRUNK}")
        return data.view(stored.dtype).view(stored.shape)

    def use_names(self, own_name: Mapping[str, str]) -> None:
        """Gives tensors other names; `own_name` maps names in the files to names in the model.

        Raises ValueError where two tensors get the same name.
        """
        given: dict[str, str] = {}
        for name in self._shard_of:
            twin = given.setdefault(own_name.get(name, name), name)
            if twin != name:
                raise ValueError(
                    f"{self.path(name)}: has both {twin} and {name}, which are the same tensor of the model; it is"
                    " unclear which copy is right: download the model again"
                )
        self._stored = {name: self._stored[stored] for name, stored in given.items()}
        self._shard_of = {name: self._shard_of[stored] for name, stored in given.items()}

    def _find(self) -> dict[str, str]:
        index, single = self.folder / self._index_file, self.folder / self._weights_file
        if index.is_file():
            shard_of = _read_index(index)
            names_in = {shard: self._open(shard) for shard in sorted(set(shard_of.values()))}
            for shard, names in names_in.items():
                for name in names & shard_of.keys():
                    if shard_of[name] != shard:
                        raise ValueError(
                            f"{self.folder / shard}: contains {name}, but {index.name} says it is in"
                            f" {shard_of[name]}; it is unclear which copy is right: download the model again"
                        )
            for name, shard in shard_of.items():
                if name not in names_in[shard]:
                    raise ValueError(
                        f"{self.folder / shard}: {name} is missing, but {index.name} says it is in this file"
                    )
            return shard_of
        if single.is_file():
            return dict.fromkeys(self._open(single.name), single.name)
        raise ValueError(self._nothing_found())

    def _open(self, shard: str) -> frozenset[str]:
        path = self.folder / shard
        if not path.is_file():
            raise ValueError(f"{path}: missing, but {self._index_file} lists it; download the model again")
        try:
            if is_lfs_pointer(path):
                raise ValueError(f"{path}: not a complete safetensors file {LFS_POINTER}")
            self._files[shard] = self._stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise ValueError(
                f"{path}: not a complete safetensors file ({error}); download it again"
            ) from error
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error}") from error
        stored = _read_header(path, shard)
        self._stored.update(stored)
        return frozenset(stored)

    def _nothing_found(self) -> str:
        expected = f"expected {self._weights_file} or {self._index_file}"
        pickled = sorted(path.name for pattern in _PICKLED for path in self.folder.glob(pattern))
        if pickled:
            return (
                f"{self.folder}: found {pickled[0]} but no safetensors weights, {expected}; pickled files are rejected"
                " because loading one runs the code in it: load the model in a safe environment and save it again with"
                " save_pretrained, which writes safetensors, or download its safetensors files"
            )
        variants = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not variants:
            return f"{self.folder}: no weights, {expected}"
        return (
            f"{self.folder}: no weights, {expected}; found {', '.join(variants[:5])}. To use weights with another name,"
            f" as variants such as fp16 have, rename their file to {self._weights_file}"
        )


def _read_header(path: Path, shard: str) -> dict[str, Stored]:
    """Reads the locations of a file's tensors; safetensors has already checked that the file is complete."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    stored = {}
    for name, facts in header.items():
        dtype = _DTYPES.get(facts["dtype"])
        if dtype is None:
            raise ValueError(f"{path}: {name}: got dtype {facts['dtype']}, accepted: {', '.join(_DTYPES)}")
        start, stop = (8 + length + offset for offset in facts["data_offsets"])
        stored[name] = Stored(shard, start, stop, dtype, tuple(facts["shape"]))
    return stored


def weight_files(folder: Path, weights_file: str = WEIGHTS_FILE) -> list[str]:
    """Returns the names of a folder's weight files, from its index if it has one.

    Raises ValueError for a damaged index.
    """
    index = folder / f"{weights_file}.index.json"
    return sorted(set(_read_index(index).values())) if index.is_file() else [weights_file]


def _read_index(path: Path) -> dict[str, str]:
    index = read_object(path)
    shard_of = index.get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{path}: weight_map is missing; expected a map from tensor names to files")
    for name, shard in shard_of.items():
        # A name with a folder in it could point outside the model's folder.
        if (
            not isinstance(shard, str)
            or shard != os.path.basename(shard)
            or not shard.endswith(".safetensors")
        ):
            raise ValueError(
                f"{path}: {name} is in {shard!r}, expected a safetensors file in the folder of the index"
            )
    return shard_of


def write_weights(
    groups: Iterable[Mapping[str, Tensor]],
    folder: Path,
    *,
    max_shard_bytes: int,
    weights_file: str = WEIGHTS_FILE,
) -> None:
    """Writes tensors into `folder` in shards of at most `max_shard_bytes`, several with an index.

    A group is never split between files; a group larger than `max_shard_bytes` gets its own file.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for group in groups:
        group_size = sum(tensor.nbytes for tensor in group.values())
        if shards[-1] and size + group_size > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1].update(group)
        size += group_size
        total += group_size
    if len(shards) == 1:
        _write_shard(shards[0], folder / weights_file)
        return
    stem = weights_file.removesuffix(".safetensors")
    shard_of = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(shard, folder / file)
        shard_of.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
    write_file(folder / f"{weights_file}.index.json", json.dumps(index, indent=2) + "\n")


def _write_shard(shard: Mapping[str, Tensor], path: Path) -> None:
    """Writes a safetensors file, copying one tensor at a time to the host.

    The bytes are those of `safetensors.torch.save_file`, which would need all tensors on the host at once.
    """
    ranks = {dtype: rank for rank, dtype in enumerate(_CODES)}
    names = sorted(shard, key=lambda name: (ranks[shard[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = shard[name]
        start, end = end, end + math.prod(tensor.shape) * tensor.element_size()
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            tensor = shard[name].detach().contiguous().cpu()
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
