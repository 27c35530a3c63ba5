"""Does one piece of work at a time in a thread, and loses none of its errors."""

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from halfbyte.trainer.runtime.disk import disk_fault
from halfbyte.trainer.wording import printable

log = logging.getLogger(__name__)

THREAD_NAME = "halfbyte: checkpoints"


class Background:
    """A thread for work such as writing files. A context manager, whose end waits for the work.

    An error of the work is raised exactly once, by the next `start`, `raise_error` or `wait`. If the context ends
    with another error, that one goes on, and the work's error is logged.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Starts a piece of work, after the one before has ended."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        # Not a daemon: if the main thread ends in a hurry, Python still waits for the files to be complete.
        self._thread = threading.Thread(target=run, name=THREAD_NAME)
        self._thread.start()

    def raise_error(self) -> None:
        """Raises the error of the work, if it has failed; does not wait."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Waits for the work to end, and raises its error."""
        self._join()
        self.raise_error()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            self._join()
        except BaseException:
            self._log_error()
            raise
        if error is None:
            self.raise_error()
        else:
            self._log_error()

    def _log_error(self) -> None:
        """Logs the error of the work, because another error is on its way."""
        error, self._error = self._error, None
        if error is not None:
            log.error(
                "the last checkpoint could not be saved: %s", printable(disk_fault(error) or str(error))
            )

    def _join(self) -> None:
        """Waits for the work. A signal that stops the process is raised only when the work has ended."""
        if self._thread is None:
            return
        try:
            self._thread.join()
        finally:
            # A second time after an interruption: the lock of the run's folder may not be released before.
            self._thread.join()
            self._thread = None
