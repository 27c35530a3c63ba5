"""Which weights samples, validation, checkpoints and exports see: those that train, or an average of them."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class TrainedWeights:
    """The adapter's weights as they train, without an average."""

    averaged = False

    def update(self, step: int) -> None:
        """Called after each optimizer step, counted from 1."""

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within it the model holds what a user is to see; afterwards what trains, to the bit."""
        yield

    def apply_average(self) -> None:
        """Leaves in the model what a user is to see, for good."""

    def restore(self, average: Mapping[str, Tensor]) -> None:
        """Takes over the average of a checkpoint, by the names of the parameters."""


class AveragedWeights(TrainedWeights):
    """An average of the weights, put in their place where somebody looks."""

    averaged = True

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """See `TrainedWeights`. The weights that train are copied back: arithmetic would not restore every bit."""
        trained = [parameter.detach().clone() for parameter in self.parameters.values()]
        self.apply_average()
        try:
            yield
        finally:
            self._resume()
            with torch.no_grad():
                for parameter, value in zip(self.parameters.values(), trained, strict=True):
                    parameter.copy_(value)

    @abstractmethod
    def apply_average(self) -> None:
        """See `TrainedWeights`."""

    def _resume(self) -> None:
        """Called before the weights that train are put back."""


class OptimizerAverage(AveragedWeights):
    """The average that an optimizer keeps in its own state and gives in its evaluation mode."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: Any) -> None:
        super().__init__(parameters)
        self.optimizer = optimizer

    def apply_average(self) -> None:
        """See `TrainedWeights`."""
        self.optimizer.eval()

    def _resume(self) -> None:
        self.optimizer.train()


class Ema(AveragedWeights):
    """average <- d average + (1 - d) weights, in fp32 on the weights' device: as much memory as the adapter."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, decay: float, every: int = 1, warmup: bool = True
    ) -> None:
        """`decay` is that of one step; where only each `every`-th updates, the decay is its power."""
        super().__init__(parameters)
        self.decay = decay
        self.every = every
        self.warmup = warmup
        self.average = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}

    def update(self, step: int) -> None:
        """See `TrainedWeights`: a function of the step alone, so that a resumed run has nothing to recall."""
        if step % self.every:
            return
        kept = self.decay**self.every
        if self.warmup:
            updates = step // self.every
            kept = min(kept, (1 + updates) / (10 + updates))
        with torch.no_grad():
            weights = [parameter.float() for parameter in self.parameters.values()]
            torch._foreach_lerp_(list(self.average.values()), weights, 1 - kept)

    def apply_average(self) -> None:
        """See `TrainedWeights`."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])

    def restore(self, average: Mapping[str, Tensor]) -> None:
        """See `TrainedWeights`. Raises ValueError where the average is of other parameters."""
        if average.keys() != self.average.keys():
            raise ValueError("the saved average belongs to other parameters")
        for name, value in average.items():
            self.average[name].copy_(value)
