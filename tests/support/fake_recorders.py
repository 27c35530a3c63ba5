"""Fake recorders that replay work on the CPU, for tests of CUDA graphs without a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Rerun:
    """Replays by calling the work again and copying its result into the memory of the first call."""

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
                result = work()
            if result is not made:
                made.copy_(result)

        return made, again


class Tape(Rerun):
    """Replays like a CUDA graph: the same operations on the same tensors, without the Python code.

    Fills the first call's result with NaN, because recording a CUDA graph computes nothing.
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
    """Fails in the `nth` recording, and again with another message when it ends, as torch does."""

    nth = 1

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        if self.recorded + 1 < self.nth:
            return super().record(work)
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


class Recorders:
    """Creates recorders of one kind and counts the recordings and replays of all of them."""

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
    """Notes every operation in the context, with its tensors, so that `run` can repeat them."""

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
            for held, result in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                # Views and results of in-place operations already have the new values.
                if isinstance(held, Tensor) and held.data_ptr() != result.data_ptr():
                    held.copy_(result)


class Wrong(Rerun):
    """Replays with a result that is 5 % too large."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        made, again = super().record(work)

        def wrong() -> None:
            again()
            made.mul_(1.05)

        return made, wrong
