"""How the learning rate goes over a run: a factor of the optimizer's lr, a pure function of the step."""

import math
from abc import abstractmethod
from typing import ClassVar, Literal

from pydantic import Field

from halfbyte.trainer.registry import Registry, StatelessChoice


class Schedule(StatelessChoice):
    """A linear warm-up, then a shape of its own."""

    falls: ClassVar[bool] = True  # whether the rate is lower at the end than after the warm-up

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


class FallingSchedule(Schedule):
    """From the full rate at 0 down to a share of it at 1."""

    end: float = Field(default=0.0, ge=0, le=1)
    """The share of the rate that is left at the end."""

    @abstractmethod
    def shape(self, progress: float) -> float:
        """progress: 0 to 1 -> 1 to 0."""

    def after_warmup(self, progress: float) -> float:
        return self.end + (1.0 - self.end) * self.shape(progress)


SCHEDULES: Registry[Schedule] = Registry("learning-rate schedule")


@SCHEDULES.register
class Constant(Schedule):
    """The full rate until the end."""

    falls = False

    name: Literal["constant"]

    def after_warmup(self, progress: float) -> float:
        return 1.0


@SCHEDULES.register
class Linear(FallingSchedule):
    """A straight line down."""

    name: Literal["linear"]

    def shape(self, progress: float) -> float:
        return 1.0 - progress


@SCHEDULES.register
class Cosine(FallingSchedule):
    """Half a cosine wave down."""

    name: Literal["cosine"]

    def shape(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))


@SCHEDULES.register
class CosineRestarts(Cosine):
    """Half cosine waves of equal length, each from the full rate."""

    name: Literal["cosine_restarts"]  # type: ignore[assignment]
    cycles: int = Field(default=2, ge=1)
    """How many waves the run has."""

    def shape(self, progress: float) -> float:
        return super().shape(progress * self.cycles % 1.0)


@SCHEDULES.register
class Polynomial(FallingSchedule):
    """A power of what is left of the run."""

    name: Literal["polynomial"]
    power: float = Field(default=2.0, gt=0)
    """1 is the straight line; higher powers fall earlier."""

    def shape(self, progress: float) -> float:
        return float((1.0 - progress) ** self.power)


@SCHEDULES.register
class Cooldown(FallingSchedule):
    """The full rate, then a straight line down at the end: a run can be made longer until it begins to cool."""

    name: Literal["cooldown"]
    share: float = Field(default=0.2, gt=0, le=1)
    """The share of the steps after the warm-up in which the rate falls."""

    def shape(self, progress: float) -> float:
        return min(1.0, (1.0 - progress) / self.share)
