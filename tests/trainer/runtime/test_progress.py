"""Tests progress in a log: finished units, rate and time left."""

import io

import pytest
from rich.console import Console

from halfbyte.trainer.runtime import progress
from halfbyte.trainer.runtime.progress import BYTES, LazyProgress, Progress


class Clock:
    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines_of(show):
    text = io.StringIO()
    show(Console(file=text, soft_wrap=True))
    return text.getvalue().splitlines()


def test_bytes_are_shown_as_gigabytes_with_the_time_left(clock):
    def show(console):
        loading = Progress(console, "loading", total=24 * 10**9, unit=BYTES)
        for gigabytes in (2, 6, 24):
            clock.now += 5
            loading.advance(gigabytes * 10**9)
        loading.close()

    # Every ten seconds, and at the end.
    assert lines_of(show) == [
        "loading 6.0/24.0 GB  0.60 GB/s  0:30 left",
        "loading 24.0/24.0 GB  1.60 GB/s  0:00 left",
    ]


@pytest.mark.parametrize(
    ("total", "line"),
    [
        (6_400_000, "loading 6.4/6.4 MB  0.64 MB/s  0:00 left"),
        (1500, "loading 1.5/1.5 kB  0.15 kB/s  0:00 left"),
        (0, "loading 0.0/0.0 B  0.00 B/s  0:00 left"),
    ],
)
def test_few_bytes_are_shown_in_smaller_units(clock, total, line):
    def show(console):
        loading = Progress(console, "loading", total=total, unit=BYTES)
        clock.now += 10
        loading.advance(total)
        loading.close()

    assert lines_of(show)[0].replace("unknown", "0:00") == line


def test_other_units_are_counted(clock):
    def show(console):
        counted = LazyProgress(console, "reading", "picture")
        counted(0, 40)
        clock.now += 20
        counted(10, 40)
        counted.close()

    assert lines_of(show) == ["reading 10/40  0.50 picture/s  1:00 left"]


def test_a_terminal_gets_a_bar_in_gigabytes():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    bar = Progress(console, "loading", total=24 * 10**9, unit=BYTES)
    bar.advance(6 * 10**9)
    bar.close()
    assert "6.0/24.0 GB" in text.getvalue()
