"""A training stage's clock: how many steps fit, the learning rate at each, lines of progress with time left."""

import math
import time

_MEASURED = 150  # steps after which the pace is known; the learning rate is still warming up
_SLOW = 50  # first steps, with compilation, that the pace leaves out
_SPEAK_SECONDS = 5.0


class Pace:
    """Runs for a number of steps, or for as many as fit into some minutes.

    What a stage does depends on its number of steps alone, which is printed: passing it gives the same again.
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
        """Since the stage began."""
        return time.perf_counter() - self.began

    def factor(self, step: int) -> float:
        """Of the learning rate: a linear warm-up over the measured steps, then half a cosine down to zero."""
        if self.total is None or step < _MEASURED:
            return min(1.0, (step + 1) / _MEASURED)
        return 0.5 * (1 + math.cos(math.pi * (step - _MEASURED) / max(1, self.total - _MEASURED)))

    def running(self, step: int) -> bool:
        """Whether another step is due; asked before each."""
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
        """Whether `running` reads the clock at this step: what was queued on the accelerator must be done then."""
        return self.total is None and step in (_SLOW, _MEASURED)

    def due(self, step: int) -> bool:
        """Whether `tell` would print: what it takes to know the loss makes the accelerator wait."""
        last = self.total is not None and step == self.total - 1
        return last or time.perf_counter() - self._spoke >= _SPEAK_SECONDS

    def tell(self, step: int, note: str) -> None:
        """One line of progress."""
        self._spoke = time.perf_counter()
        left = "?" if self.total is None else f"{(self.total - step - 1) * self.seconds / (step + 1):.0f} s"
        print(f"{self.title} step {step + 1}/{self.total or '?'}  {note}  {left} left", flush=True)
