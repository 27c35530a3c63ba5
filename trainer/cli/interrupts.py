"""Ends a command cleanly when a signal arrives while libraries are still being imported."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from halfbyte.trainer.runtime.signals import STOPPING, describe, exit_code

INTERRUPTED = exit_code(signal.SIGINT)
"""The exit code of a command ended by Ctrl-C."""


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Makes Ctrl-C and the other stopping signals end the process at once with one line of output.

    Use it only around imports, before there is work to save. KeyboardInterrupt does not survive these
    imports: numpy's initialization turns it into an ImportError that torch swallows, and pybind11's aborts
    the process (numpy 2.4, torch 2.13). Signals that are ignored stay ignored.
    """
    former = {
        number: handler for number in STOPPING if (handler := signal.getsignal(number)) is not signal.SIG_IGN
    }
    try:
        for number in former:
            signal.signal(number, _end)
    except ValueError:  # not in the main thread, which signals do not interrupt
        yield
        return
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _end(number: int, frame: object) -> None:
    os.write(2, f"error: {describe(number)}\n".encode())
    os._exit(exit_code(number))
