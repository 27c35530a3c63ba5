"""Maps a function over many items in worker processes, in order and with a bounded number of results in memory."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import TypeVar

import torch

from halfbyte.trainer.errors import OutOfMemory

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_WORKERS = 16
_AHEAD = 3  # items for each worker that are computed or wait to be taken


def worker_count(local_processes: int) -> int:
    """Returns how many worker processes each of a machine's training processes may start."""
    return max(1, min(MOST_WORKERS, _cores() // local_processes))


def mapped(
    function: Callable[[Item], Result], items: Sequence[Item], *, workers: int, doing: str
) -> Generator[Result, None, None]:
    """Yields function(item) for each item, in their order.

    Args:
        function: importable by its name, like everything that it takes and returns picklable.
        workers: the number of processes; 0 computes in this one.
        doing: completes "a process that was", for the error message.

    Raises:
        OutOfMemory: a worker was killed, as the system does when memory is full.
    """
    if workers == 0:
        yield from map(function, items)
        return
    # Not forked from this process, which may use CUDA and has threads. The server imports once for all workers.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, _module_of(function)])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise OutOfMemory(
            f"a process that was {doing} ended without a message, as when the system kills it because the host's"
            " memory is full. What was finished stays in the cache; free memory and start again"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin() -> None:
    """Prepares a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the workers
    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None
    # A worker waits for work forever if its parent is killed.
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _module_of(function: Callable[..., object]) -> str:
    while isinstance(function, partial):
        function = function.func
    return function.__module__
