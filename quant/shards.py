"""A model's weights on disk in safetensors: one file, or several with an index; read lazily, written whole."""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = "diffusion_pytorch_model.safetensors.index.json"
# Other files that hold weights, which this reader refuses: pickles run code when they are loaded.
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class ShardedWeights:
    """The tensors of a folder by name; nothing is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError, naming the file, where weights or shards are missing or damaged."""
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
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
        """In the order of the shards, so that reading one after the other reads each file once."""
        return sorted(self._shard_of, key=lambda name: (self._shard_of[name], name))

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self.folder / self._shard_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        return tuple(self._files[self._shard_of[name]].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU, mapped from the file where the system can."""
        tensor: Tensor = self._files[self._shard_of[name]].get_tensor(name)
        return tensor

    def _find(self) -> dict[str, str]:
        index, single = self.folder / INDEX_FILE, self.folder / WEIGHTS_FILE
        if index.is_file():
            shard_of = _read_index(index)
            held = {shard: self._open(shard) for shard in sorted(set(shard_of.values()))}
            for shard, names in held.items():
                for name in names & shard_of.keys():
                    if shard_of[name] != shard:
                        raise ValueError(
                            f"{self.folder / shard}: holds {name}, which {INDEX_FILE} places in {shard_of[name]};"
                            " which of the two is right cannot be told"
                        )
            for name, shard in shard_of.items():
                if name not in held[shard]:
                    raise ValueError(f"{self.folder / shard}: lacks {name}, which {INDEX_FILE} places there")
            return shard_of
        if single.is_file():
            return dict.fromkeys(self._open(WEIGHTS_FILE), WEIGHTS_FILE)
        raise ValueError(self._nothing_found())

    def _open(self, shard: str) -> frozenset[str]:
        path = self.folder / shard
        if not path.is_file():
            raise ValueError(f"{path}: missing, though {INDEX_FILE} names it; download the model again")
        try:
            self._files[shard] = self._stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); download it again") from error
        return frozenset(self._files[shard].keys())

    def _nothing_found(self) -> str:
        expected = f"expected {WEIGHTS_FILE} or {INDEX_FILE}"
        pickled = sorted(path.name for pattern in _PICKLED for path in self.folder.glob(pattern))
        if pickled:
            return (
                f"{self.folder}: holds {pickled[0]} but no safetensors weights, {expected}; pickled files are not"
                " read, because loading one runs the code in it: convert the model with diffusers'"
                " save_pretrained"
            )
        variants = sorted(path.name for path in self.folder.glob("*.safetensors"))
        found = f"; it has {', '.join(variants[:5])}" if variants else ""
        return f"{self.folder}: no weights, {expected}{found}"


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    shard_of = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{path}: has no weight_map from tensor names to files")
    for name, shard in shard_of.items():
        # A name with a folder in it could lead out of the model.
        if (
            not isinstance(shard, str)
            or shard != os.path.basename(shard)
            or not shard.endswith(".safetensors")
        ):
            raise ValueError(f"{path}: {name} is in {shard!r}, expected a safetensors file beside the index")
    return shard_of


def write_weights(groups: Iterable[Mapping[str, Tensor]], folder: Path, *, max_shard_bytes: int) -> None:
    """Write tensors into `folder`, a group never parted between files; an index where there are several files.

    A group bigger than `max_shard_bytes` gets a file of its own.
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
        _write_shard(shards[0], folder / WEIGHTS_FILE)
        return
    stem = WEIGHTS_FILE.removesuffix(".safetensors")
    shard_of = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(shard, folder / file)
        shard_of.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
    write_text(json.dumps(index, indent=2) + "\n", folder / INDEX_FILE)


def _write_shard(shard: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in shard.items()}, path, {"format": "pt"})
    flush(path)


def write_text(text: str, path: Path) -> None:
    """Write a text file through to the disk."""
    path.write_text(text, encoding="utf-8")
    flush(path)


def flush(path: Path) -> None:
    """Have the system put a file, or the entries of a folder, on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
