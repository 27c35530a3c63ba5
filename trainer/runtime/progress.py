"""Shows the progress of long tasks: a bar on a terminal, a line every ten seconds in a log."""

import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from halfbyte.trainer.runtime.sizes import decimal_unit, file_size

_LOG_SECONDS = 10.0
OnProgress = Callable[[int, int], None]
"""A progress callback: takes the number of finished units and the total."""

BYTES = "B"
"""The unit for bytes. Its numbers are shown in GB, MB or kB, depending on the total."""


class Progress:
    """Shows the rate and the remaining time of one long task."""

    def __init__(
        self, console: Console, title: str, *, total: int, done: int = 0, unit: str = "step"
    ) -> None:
        self.console = console
        self.title = title
        self.total = total
        self.unit = unit
        self.remark = ""
        """Text to show after the detail until it is replaced."""
        self._first = done
        self._started = time.perf_counter()
        self._printed = self._started
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        if console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn() if unit == BYTES else MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total, completed=done, note="")
            self._bar.start()

    def advance(self, done: int, detail: str = "") -> None:
        """Reports that `done` units of the total are finished, with `detail` shown before the rate."""
        now = time.perf_counter()
        rate = (done - self._first) / max(now - self._started, 1e-9)
        note = f"{rate:.2f} {self.unit}/s"
        if self.unit == BYTES:
            name, size = decimal_unit(self.total)
            note = f"{rate / size:.2f} {name}/s"
        if detail:
            note = "  ".join(part for part in (detail, self.remark, note) if part)
        if self._bar is not None and self._task is not None:
            if detail:
                self._bar.update(self._task, completed=done, note=note)
            else:
                self._bar.update(self._task, completed=done)
        elif done == self.total or now - self._printed >= _LOG_SECONDS:
            self._printed = now
            left = (self.total - done) / rate if rate > 0 else float("inf")
            self.console.print(
                f"{self.title} {self._share(done)}  {note}  {_clock(left)} left", highlight=False
            )

    def restart(self) -> None:
        """Measures the rate from now on, so that time spent before the task does not count."""
        self._started = self._printed = time.perf_counter()

    def _share(self, done: int) -> str:
        if self.unit == BYTES:
            name, size = decimal_unit(self.total)
            return f"{done / size:.1f}/{self.total / size:.1f} {name}"
        return f"{done}/{self.total}"

    def close(self) -> None:
        """Ends the display and restores the terminal."""
        if self._bar is not None:
            self._bar.stop()


class LazyProgress:
    """A progress callback (done, total) that opens its display at the first call, when the total is known."""

    def __init__(self, console: Console, title: str, unit: str) -> None:
        self._console = console
        self._title = title
        self._unit = unit
        self._progress: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._progress is None:
            self._progress = Progress(self._console, self._title, total=total, done=done, unit=self._unit)
        self._progress.advance(done)

    def close(self) -> None:
        """Ends the display and restores the terminal."""
        if self._progress is not None:
            self._progress.close()


class UploadLog:
    """Logs the upload of a few parts of known size: one line as each part starts, with the bytes done so far."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console = console
        self._title = title
        self._total = total
        self._done = 0

    def announce(self, part: str, size: int) -> None:
        """Prints that the next part, of `size` bytes, starts."""
        self._console.print(
            f"{self._title} {part} ({file_size(size)}), {file_size(self._done)} of {file_size(self._total)} done",
            markup=False,
            highlight=False,
        )
        self._done += size


def _clock(seconds: float) -> str:
    if seconds == float("inf"):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def write_lines(console: Console, lines: Sequence[tuple[str, str]]) -> None:
    """Prints labels and texts as two columns."""
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        console.print(f"{label:<{width}}  {text}", markup=False, highlight=False)
