"""Ctrl-C while libraries are imported."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended."""


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Within it Ctrl-C ends the process in one line, without an exception; for imports, before there is work to keep.

    What is imported does not pass exceptions on: numpy's start turns KeyboardInterrupt into an ImportError that torch
    swallows, pybind11's aborts the process (numpy 2.4, torch 2.13).
    """
    # Whoever has it ignored, or handles it, goes on doing so.
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
