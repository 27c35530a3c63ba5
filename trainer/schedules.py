"""How the learning rate goes over a run: a factor of the optimizer's lr, a pure function of the step."""

import math
from abc import abstractmethod
from typing import Literal

from pydantic import Field

from halfbyte.trainer.registry import Registry, StatelessChoice


class Schedule(StatelessChoice):
    """A linear warm-up, then a shape of its own."""

    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps in which the learning rate rises to its full value."""

    @abstractmethod
    def after_warmup(self, progress: float) -> float:
        """progress: 0 at the first step after the warm-up, just below 1 at the last -> the factor."""

    def factor(self, step: int, total_steps: int) -> float:
        """The factor for optimizer step `step`, counted from 0, of `total_steps`.

        It is never 0: the first step of a warm-up already moves, and so does the last of the run.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup((step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))


SCHEDULES: Registry[Schedule] = Registry("learning-rate schedule")


@SCHEDULES.register
class Constant(Schedule):
    """The full rate until the end."""

    name: Literal["constant"]

    def after_warmup(self, progress: float) -> float:
        return 1.0


@SCHEDULES.register
class Linear(Schedule):
    """A straight line to zero at the end."""

    name: Literal["linear"]

    def after_warmup(self, progress: float) -> float:
        return 1.0 - progress


@SCHEDULES.register
class Cosine(Schedule):
    """Half a cosine wave to zero at the end."""

    name: Literal["cosine"]

    def after_warmup(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))
