"""Learning-rate schedules: the factor of the optimizer's lr, as a pure function of the step."""

import math
from abc import abstractmethod
from typing import ClassVar, Literal

from pydantic import Field

from halfbyte.trainer.registry import Registry, StatelessChoice


class Schedule(StatelessChoice):
    """A linear warm-up, followed by the schedule's own shape."""

    falls: ClassVar[bool] = True  # True if the rate ends lower than it is after the warm-up

    warmup_steps: int = Field(default=0, ge=0, le=10**8)
    """Optimizer steps over which the learning rate rises linearly to its full value."""

    @abstractmethod
    def after_warmup(self, progress: float) -> float:
        """Returns the factor; `progress` is 0 right after the warm-up, and below 1 at the last step."""

    def factor(self, step: int, total_steps: int) -> float:
        """Returns the factor for optimizer step `step`, counted from 0, of `total_steps`.

        It is never 0: the warm-up starts at 1 / warmup_steps, and `progress` is below 1 at the last step.
        below 1.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup((step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))


class FallingSchedule(Schedule):
    """A schedule that falls from the full rate to the share `end` of it."""

    end: float = Field(default=0.0, ge=0, le=1)
    """Share of the rate that is left at the end."""

    @abstractmethod
    def shape(self, progress: float) -> float:
        """Maps progress from 0 to 1 to a value from 1 to 0."""

    def after_warmup(self, progress: float) -> float:
        return self.end + (1.0 - self.end) * self.shape(progress)


SCHEDULES: Registry[Schedule] = Registry("learning-rate schedule")


@SCHEDULES.register
class Constant(Schedule):
    """Full rate until the end."""

    falls = False

    name: Literal["constant"]

    def after_warmup(self, progress: float) -> float:
        return 1.0


@SCHEDULES.register
class Linear(FallingSchedule):
    """Falls linearly."""

    name: Literal["linear"]

    def shape(self, progress: float) -> float:
        return 1.0 - progress


@SCHEDULES.register
class Cosine(FallingSchedule):
    """Falls along half a cosine wave."""

    name: Literal["cosine"]

    def shape(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))


@SCHEDULES.register
class CosineRestarts(Cosine):
    """Half cosine waves of equal length, each starting at the full rate."""

    name: Literal["cosine_restarts"]  # type: ignore[assignment]
    cycles: int = Field(default=2, ge=1)
    """Number of waves in the run."""

    def shape(self, progress: float) -> float:
        return super().shape(progress * self.cycles % 1.0)


@SCHEDULES.register
class Polynomial(FallingSchedule):
    """Falls with a power of the remaining share of the run."""

    name: Literal["polynomial"]
    power: float = Field(default=2.0, gt=0)
    """1 is linear; higher powers fall earlier."""

    def shape(self, progress: float) -> float:
        return float((1.0 - progress) ** self.power)


@SCHEDULES.register
class Cooldown(FallingSchedule):
    """Full rate, then a linear fall at the end: a run can be extended until the fall begins."""

    name: Literal["cooldown"]
    share: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps after the warm-up in which the rate falls."""

    def shape(self, progress: float) -> float:
        return min(1.0, (1.0 - progress) / self.share)
