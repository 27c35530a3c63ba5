"""The weights that samples, validation, checkpoints and exports use: trained or averaged.

A run always trains the parameters in the model. With an average, `swapped_in` puts it into the model for as
long as something looks at it.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class TrainedWeights:
    """The adapter's trained weights, used everywhere; the base class of all averages."""

    averaged = False  # True if users see an average, not the trained weights

    def update(self, step: int) -> None:
        """Adds the trained weights to the average after optimizer step `step`, counted from 1."""

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Puts the weights that users see into the model inside the context.

        Afterwards the model has its trained weights again, bitwise identical.
        """
        yield

    def apply_average(self) -> None:
        """Puts the weights that users see into the model for good."""

    def restore(self, average: Mapping[str, Tensor]) -> None:
        """Restores the average of a checkpoint; `average` has the parameters' names."""


class AveragedWeights(TrainedWeights):
    """Base class of averages, which `swapped_in` puts into the model for as long as they are needed."""

    averaged = True

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """See `TrainedWeights`; inside the context the device holds one more copy of the adapter."""
        # A copy, because computing the trained weights back from the average would not restore every bit.
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
        """Runs right before the trained weights are copied back."""


class OptimizerAverage(AveragedWeights):
    """The average of an optimizer such as schedule-free AdamW.

    The optimizer keeps it in its state, and its `eval()` puts it into the parameters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: Any) -> None:
        super().__init__(parameters)
        self.optimizer = optimizer

    def apply_average(self) -> None:
        """See `TrainedWeights`."""
        self.optimizer.eval()

    def _resume(self) -> None:
        self.optimizer.train()


class Ema(AveragedWeights):
    """Exponential moving average: average <- d * average + (1 - d) * weights after each update.

    Kept in fp32 whatever the weights' dtype: with d = 0.999 an update changes the average by a thousandth of
    the difference, which bf16 with its 8 significant bits would mostly round away. Lies on the weights'
    device, and takes as much memory as an fp32 adapter.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, decay: float, every: int = 1, warmup: bool = True
    ) -> None:
        """Starts the average at the current weights.

        decay: the decay of one optimizer step. every: update only after each `every`-th step, with
        decay**every, so that the average spans the same number of steps. warmup: begin with a lower decay,
        see `update`.
        """
        super().__init__(parameters)
        self.decay = decay
        self.every = every
        self.warmup = warmup
        self.average = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}

    def update(self, step: int) -> None:
        """See `TrainedWeights`. The decay depends only on the step, so only the average is saved."""
        if step % self.every:
            return
        kept = self.decay**self.every
        if self.warmup:
            updates = step // self.every
            # min(d, (1 + n) / (10 + n)) after n updates: 2/11 at the first, so that the start weights fade
            # quickly.
            kept = min(kept, (1 + updates) / (10 + updates))
        with torch.no_grad():
            weights = [parameter.float() for parameter in self.parameters.values()]
            # lerp: average + (1 - d) * (weights - average), in one launch for all parameters.
            torch._foreach_lerp_(list(self.average.values()), weights, 1 - kept)

    def apply_average(self) -> None:
        """See `TrainedWeights`."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])

    def restore(self, average: Mapping[str, Tensor]) -> None:
        """See `TrainedWeights`.

        Raises:
            ValueError: the names of `average` are not those of the parameters.
        """
        if average.keys() != self.average.keys():
            raise ValueError("the saved average has the names of other parameters")
        for name, value in average.items():
            self.average[name].copy_(value)
