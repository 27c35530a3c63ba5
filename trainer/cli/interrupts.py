"""Ends a command cleanly when Ctrl-C arrives while libraries are still being imported."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""The exit code of a command ended by Ctrl-C."""


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Makes Ctrl-C end the process at once with one line of output.

    Use it only around imports, before there is work to save. KeyboardInterrupt does not survive these
    imports: numpy's initialization turns it into an ImportError that torch swallows, and pybind11's aborts
    the process (numpy 2.4, torch 2.13).
    """
    # Keep a handler that the caller installed, or SIG_IGN.
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: object) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(INTERRUPTED)
