"""Turns the signals that stop a process into one orderly end, in every phase of a command."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Ctrl-C; schedulers, `kill` and shutdowns; a dropped connection; SLURM's warning before the time limit.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """A signal stops the command now. A KeyboardInterrupt, because libraries let that pass through."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopSignals:
    """The process's handlers of STOPPING.

    A signal raises Stopped in the main thread. While signals are deferred, which training does during its
    steps, the first signal is only noted in `received`, and a second one raises Stopped. Once Stopped has been
    raised, the next signal ends the process at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferring = False
        self._raised = False
        self._former: dict[int, Any] = {}

    @contextmanager
    def installed(self) -> Iterator["StopSignals"]:
        """Handles the signals inside the context. Does nothing if they are handled already.

        Signals that the process was started to ignore stay ignored, as `nohup` expects. Only the main thread
        can install handlers.
        """
        if self._former or threading.current_thread() is not threading.main_thread():
            yield self
            return
        self.received, self._deferring, self._raised = None, False, False
        numbers: tuple[int, ...] = STOPPING
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._handle)
        try:
            yield self
        finally:
            former, self._former = self._former, {}
            for number, handler in former.items():
                signal.signal(number, handler)

    def reinstall(self) -> None:
        """Puts the handlers back after a library has replaced them."""
        for number in self._former:
            signal.signal(number, self._handle)

    def defer(self, deferring: bool) -> None:
        """Begins or ends the deferral of signals."""
        self._deferring = deferring

    def raise_received(self) -> None:
        """Raises Stopped if a signal has been noted."""
        if self.received is not None:
            raise Stopped(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._raised:
            os._exit(exit_code(number))
        if self._deferring and self.received is None:
            self.received = number
            return
        self._raised = True
        raise Stopped(number)


SIGNALS = StopSignals()
"""The handlers of this process; a process has only one set."""


def exit_code(number: int) -> int:
    """Returns the exit code of a process that a signal has stopped, as shells report it."""
    return 128 + number


def describe(number: int) -> str:
    """Returns the message for a signal: "interrupted" for Ctrl-C, else with the signal's name."""
    return "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
