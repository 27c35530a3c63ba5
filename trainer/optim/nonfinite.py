"""The choices of a recipe for a step whose loss or gradient is NaN or infinite."""

from abc import abstractmethod
from typing import Literal

from pydantic import Field

from halfbyte.trainer.registry import Registry, StatelessChoice


class OnNonFinite(StatelessChoice):
    """Base class of the choices."""

    @property
    @abstractmethod
    def most(self) -> int | None:
        """The number of such steps in a row that are left out; None if the first one ends the run."""


NONFINITE: Registry[OnNonFinite] = Registry("way to treat values that are not finite")


@NONFINITE.register
class Stop(OnNonFinite):
    """End the run with exit code 8; its earlier checkpoints have finite values only."""

    name: Literal["stop"]

    @property
    def most(self) -> None:
        """See `OnNonFinite`."""


@NONFINITE.register
class Skip(OnNonFinite):
    """Leave the step out: adapter, optimizer and moving average stay as they are; the step counts for the schedule.

    All processes decide alike. Each step then waits for its loss and gradient, which costs some speed on a GPU.
    """

    name: Literal["skip"]
    in_a_row: int = Field(default=3, ge=1, le=1000)
    """The largest number of steps in a row that are left out. One more ends the run with exit code 8."""

    @property
    def most(self) -> int:
        """See `OnNonFinite`."""
        return self.in_a_row
