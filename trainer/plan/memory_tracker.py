"""Tracks the bytes that are alive while operations run, by kind, and counts the work of the operations.

Watches every operation that torch dispatches, and follows the storages of its results until they are freed.
On meta tensors this gives the memory that the same operations would use on a CUDA device: shapes and
lifetimes are the real ones, and `op_costs` adds the memory inside kernels.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from halfbyte.trainer.plan import meta_results
from halfbyte.trainer.plan.op_costs import costs_of

_GRANULE = 512  # bytes; torch's CUDA allocator rounds every size up to a multiple of it

WORKING = "working memory"
INSIDE = "inside a kernel"


def allocated(nbytes: int) -> int:
    """Returns the bytes that torch's CUDA allocator uses for a tensor of `nbytes`."""
    return -(-nbytes // _GRANULE) * _GRANULE


@dataclass
class _Block:
    """A storage that has been allocated; it may be freed already."""

    nbytes: int
    kind: str


@dataclass(frozen=True)
class Peak:
    """The largest number of bytes that were alive at the same time."""

    nbytes: int
    by_kind: Mapping[str, int]


class LiveBytes(TorchDispatchMode):
    """Dispatch mode that counts the live bytes on `device_type`; tensors on other devices do not count."""

    def __init__(self, device_type: str = "meta") -> None:
        super().__init__()
        self.now = 0
        self.flops = 0
        self.calls = 0  # operations, views among them
        self.host = 0  # bytes made within `on_host`
        self._device_type = device_type
        self._blocks: list[_Block] = []
        # Key of a storage -> (index of its block, or None if it is in host memory; a weak reference to the
        # storage). The weak reference's callback frees the block; it also shows that a key is stale and was
        # reused.
        self._alive: dict[int, tuple[int | None, Any]] = {}
        # History: the index of a block when it is allocated, and the index's bitwise complement when it is
        # freed. A peak is a position in this list, so its kinds can be looked up later, after blocks got
        # their names.
        self._events: list[int] = []
        self._peak = 0
        self._peak_place = 0
        self._peak_inside = 0
        self._on_host = False

    def hold(self, tensors: Iterable[Tensor], kind: str) -> int:
        """Counts `tensors` as `kind` and returns their bytes.

        The tensors may exist already. A shared storage counts once.
        """
        blocks = {
            number: self._blocks[number] for tensor in tensors if (number := self._count(tensor)) is not None
        }
        for block in blocks.values():
            block.kind = kind
        return sum(block.nbytes for block in blocks.values())

    def name_rest(self, kind: str) -> int:
        """Renames all live working memory to `kind`, and returns its bytes."""
        alive = [self._blocks[number] for number, _ in self._alive.values() if number is not None]
        named = [block for block in alive if block.kind == WORKING]
        for block in named:
            block.kind = kind
        return sum(block.nbytes for block in named)

    def restart(self) -> None:
        """Resets the peak and the counted work."""
        self.flops = 0
        self.calls = 0
        self._note(0)

    @property
    def peak(self) -> Peak:
        """The peak since `restart`, by kind; a block that was renamed after the peak has its new name."""
        alive: set[int] = set()
        for number in self._events[: self._peak_place]:
            (alive.add if number >= 0 else alive.discard)(number if number >= 0 else ~number)
        kinds: Counter[str] = Counter()
        for number in alive:
            kinds[self._blocks[number].kind] += self._blocks[number].nbytes
        if self._peak_inside:
            kinds[INSIDE] += self._peak_inside
        return Peak(self._peak, dict(kinds))

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Counts tensors that are created inside the context as host memory."""
        self._on_host = True
        try:
            yield
        finally:
            self._on_host = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation and counts its results and its work; torch calls it for every operation."""
        result = meta_results.run(func, args, kwargs or {})
        if isinstance(result, Tensor):
            self._count(result)
        else:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._count(leaf)
        self.calls += 1
        costs = costs_of(func)
        if costs.work is not None:
            self.flops += costs.work(args, result)
        own = 0 if costs.inside is None else costs.inside(args, result)
        if self.now + own > self._peak:
            self._note(own)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled in a dry run, and torch's guard against it costs as much as counting an operation.
        return False

    def _count(self, tensor: Tensor) -> int | None:
        """Returns the index of the tensor's block, a new one if needed; None if it is not on the device."""
        if tensor.device.type != self._device_type:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._alive.get(key)
        if known is not None and known[1]() is not None:
            return known[0]
        nbytes = allocated(storage.nbytes())
        if self._on_host:
            self.host += nbytes
            self._alive[key] = (None, weakref.ref(storage, lambda _: self._free(key)))
            return None
        number = len(self._blocks)
        self._blocks.append(_Block(nbytes, WORKING))
        self._alive[key] = (number, weakref.ref(storage, lambda _: self._free(key)))
        self._events.append(number)
        self.now += nbytes
        if self.now > self._peak:
            self._note(0)
        return number

    def _free(self, key: int) -> None:
        number, _ = self._alive.pop(key)
        if number is None:
            return
        self._events.append(~number)
        self.now -= self._blocks[number].nbytes

    def _note(self, own: int) -> None:
        self._peak = self.now + own
        self._peak_place = len(self._events)
        self._peak_inside = own
