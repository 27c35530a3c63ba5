"""A training stage's clock: the number of steps that fit, the learning rate at each, and lines of progress."""

import math
import time

_MEASURED = 150  # steps after which the pace is known; the learning rate is still warming up
_SLOW = 50  # first steps, which include compilation and do not count
_SPEAK_SECONDS = 5.0


class Pace:
    """Runs for a number of steps, or for as many as fit into some minutes.

    A stage depends only on its number of steps, which is printed; passing that number gives the same result
    again.
    """

    def __init__(self, title: str, *, minutes: float | None, steps: int | None) -> None:
        if (minutes is None) == (steps is None):
            raise ValueError(f"{title}: give --minutes or --steps, one of the two")
        self.title = title
        self.minutes = minutes
        self.total = steps
        self.began = time.perf_counter()
        self._measured_from = self.began
        self._spoke = self.began

    @property
    def seconds(self) -> float:
        """Returns the seconds since the stage began."""
        return time.perf_counter() - self.began

    def factor(self, step: int) -> float:
        """Returns the learning rate's factor: linear warm-up over the measured steps, then half a cosine to zero."""
        if self.total is None or step < _MEASURED:
            return min(1.0, (step + 1) / _MEASURED)
        return 0.5 * (1 + math.cos(math.pi * (step - _MEASURED) / max(1, self.total - _MEASURED)))

    def running(self, step: int) -> bool:
        """Returns True if another step is due; call it before each step."""
        now = time.perf_counter()
        if step == _SLOW:
            self._measured_from = now
        if self.total is None and step == _MEASURED:
            assert self.minutes is not None
            seconds_a_step = (now - self._measured_from) / (_MEASURED - _SLOW)
            self.total = _MEASURED + int((60 * self.minutes - self.seconds) / seconds_a_step)
            print(f"{self.title}: {1 / seconds_a_step:.1f} steps/s, {self.total} steps", flush=True)
        if self.minutes is not None and self.seconds > 66 * self.minutes:
            print(
                f"{self.title}: stopped at step {step}, a tenth over its {self.minutes} minutes", flush=True
            )
            return False
        return self.total is None or step < self.total

    def measures(self, step: int) -> bool:
        """Returns True if `running` reads the clock at this step; the accelerator's queue must be empty then."""
        return self.total is None and step in (_SLOW, _MEASURED)

    def due(self, step: int) -> bool:
        """Returns True if `tell` would print; reading the loss makes the accelerator wait."""
        last = self.total is not None and step == self.total - 1
        return last or time.perf_counter() - self._spoke >= _SPEAK_SECONDS

    def tell(self, step: int, note: str) -> None:
        """Prints one line of progress."""
        self._spoke = time.perf_counter()
        left = "?" if self.total is None else f"{(self.total - step - 1) * self.seconds / (step + 1):.0f} s"
        print(f"{self.title} step {step + 1}/{self.total or '?'}  {note}  {left} left", flush=True)
