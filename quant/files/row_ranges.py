"""A model in one file under names that are not diffusers': its tensors, or rows of them, by diffusers' names.

Nothing is converted in memory. What diffusers holds in parts lies in the file as rows one after the other, so that a
part is a range of bytes, and is read as any other tensor is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from halfbyte.quant.files.shards import ShardedWeights


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor in a file; all of it where `stop` is None."""

    name: str
    start: int = 0
    stop: int | None = None


class SingleFile(ShardedWeights):
    """The tensors of one safetensors file; first by their own names, then by those that `rename` gives."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError, naming the file, where it is missing or damaged."""
        super().__init__(path.parent, path.name)
        self._rows: dict[str, Rows] = {name: Rows(name) for name in self._shard_of}

    def rename(self, rows: Mapping[str, Rows]) -> None:
        """From now on `names` are those of `rows`, each with the rows of a tensor that it stands for."""
        stored, shard_of = {}, {}
        for name, part in rows.items():
            whole = self._stored[part.name]
            stored[name], shard_of[name] = whole, whole.shard
            if part.stop is not None:
                row = math.prod(whole.shape[1:]) * whole.dtype.itemsize
                stored[name] = replace(
                    whole,
                    start=whole.start + part.start * row,
                    stop=whole.start + part.stop * row,
                    shape=(part.stop - part.start, *whole.shape[1:]),
                )
        self._stored, self._shard_of, self._rows = stored, shard_of, dict(rows)

    def read(self, name: str) -> Tensor:
        """See `ShardedWeights.read`."""
        part = self._rows[name]
        file = self._files[self._shard_of[name]]
        tensor: Tensor = file.get_tensor(part.name)
        return tensor if part.stop is None else tensor[part.start : part.stop]
