"""An exponential moving average of the adapter, which forgets the noise of the last steps.

With decay d it is a mean over about 1 / (1 - d) steps. For as long as fewer have been taken, d is lowered to
(1 + n) / (10 + n) at update n, lest the average cling to the adapter's start, where B is zero.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from halfbyte.trainer.optim.averages import AveragedWeights


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
        """See `Weights`: a function of the step alone, so that a resumed run has nothing to recall."""
        if step % self.every:
            return
        kept = self.decay**self.every
        if self.warmup:
            updates = step // self.every
            kept = min(kept, (1 + updates) / (10 + updates))
        with torch.no_grad():
            weights = [parameter.float() for parameter in self.parameters.values()]
            torch._foreach_lerp_(list(self.average.values()), weights, 1 - kept)

    def settle(self) -> None:
        """See `Weights`."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])

    def restore(self, average: Mapping[str, Tensor]) -> None:
        """See `Weights`. Raises ValueError where the average is of other parameters."""
        if average.keys() != self.average.keys():
            raise ValueError("the saved average belongs to other parameters")
        for name, value in average.items():
            self.average[name].copy_(value)
