"""Reads a model from one safetensors file with foreign tensor names, under diffusers' names.

Nothing is converted in memory. Where diffusers splits a tensor of the file into several, each part is a range
of whole rows. Such a range is contiguous in the file, so it is read like any other tensor.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from halfbyte.quant.files.shards import ShardedWeights


@dataclass(frozen=True)
class Rows:
    """Rows start to stop of a tensor in a file; the whole tensor where `stop` is None."""

    name: str
    start: int = 0
    stop: int | None = None


class SingleFile(ShardedWeights):
    """The tensors of one safetensors file, by the file's own names until `rename` replaces them."""

    def __init__(self, path: Path) -> None:
        """Opens the file. Raises ValueError, naming it, where it is missing or damaged."""
        super().__init__(path.parent, path.name)

    def rename(self, rows: Mapping[str, Rows]) -> None:
        """Replaces `names` by the keys of `rows`; each key stands for these rows of a tensor in the file."""
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
        self._stored, self._shard_of = stored, shard_of
