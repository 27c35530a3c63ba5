"""Tests of worker processes: results in order, errors, and workers that are killed."""

import os
import signal
from functools import partial

import pytest

from halfbyte.trainer.errors import OutOfMemory
from halfbyte.trainer.runtime.workers import mapped, worker_count


def test_without_workers_items_are_computed_here_when_they_are_taken() -> None:
    seen: list[int] = []
    results = mapped(seen.append, [1, 2, 3], workers=0, doing="counting")
    next(results)
    assert seen == [1]
    results.close()


def test_results_are_in_order_and_a_killed_worker_is_an_error() -> None:
    divided = partial(divmod, 100)
    numbers = list(range(1, 30))
    assert list(mapped(divided, numbers, workers=2, doing="dividing")) == [divmod(100, n) for n in numbers]
    with pytest.raises(OutOfMemory, match="a process that was ending ended without a message"):
        list(mapped(partial(signal.raise_signal), [signal.SIGKILL], workers=1, doing="ending"))


def test_the_cores_are_shared_between_the_processes_of_a_machine() -> None:
    cores = len(os.sched_getaffinity(0))
    assert worker_count(1) == min(16, cores)
    assert worker_count(10**6) == 1
