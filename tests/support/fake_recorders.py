"""Recorders for tests without a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Rerun:
    """A recorder that runs the work again, over the memory of the first time."""

    def __init__(self, device: torch.device) -> None:
        assert device == torch.device("cpu")
        self.recorded = 0
        self.replayed = 0

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.recorded += 1
        made = work()

        def again() -> None:
            self.replayed += 1
            with torch.enable_grad():
                anew = work()
            if anew is not made:
                made.copy_(anew)

        return made, again


class Tape(Rerun):
    """As a CUDA graph does: replays operations on the tensors that they had, whatever Python would do by now.

    What a first run leaves is spoilt, for a CUDA graph that is recorded has computed nothing.
    """

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.recorded += 1
        with _Operations() as operations:
            made = work()
        made.fill_(torch.nan)

        def again() -> None:
            self.replayed += 1
            operations.run()

        return made, again


class Broken(Rerun):
    """Fails at the `nth` recording, and once more when that is ended, as torch does."""

    nth = 1

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        if self.recorded + 1 < self.nth:
            return super().record(work)
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


class Recorders:
    """Makes them, and counts over all that it made."""

    def __init__(self, kind: type[Rerun] = Rerun) -> None:
        self.kind = kind
        self.made: list[Rerun] = []

    def __call__(self, device: torch.device) -> Rerun:
        self.made.append(self.kind(device))
        return self.made[-1]

    @property
    def counts(self) -> tuple[int, int]:
        return sum(one.recorded for one in self.made), sum(one.replayed for one in self.made)


class _Operations(TorchDispatchMode):
    """Notes every operation within it."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        made = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, made))
        return made

    @torch.no_grad()
    def run(self) -> None:
        for func, args, kwargs, made in self._calls:
            for held, anew in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                # Views and what is changed in place are there already.
                if isinstance(held, Tensor) and held.data_ptr() != anew.data_ptr():
                    held.copy_(anew)


class Wrong(Rerun):
    """Gives a little more than it should."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        made, again = super().record(work)

        def wrong() -> None:
            again()
            made.mul_(1.05)

        return made, wrong
