"""Notices when another process of the run has ended or no longer responds."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from halfbyte.trainer.errors import ProcessLost

_BEAT = 0.5  # seconds between the signs of life of a process
_MISSED = 5.0  # seconds without a sign of life after which a failed exchange is blamed on a process


class RankWatch:
    """Exchanges signs of life between the processes of a run, in a thread, over torch.distributed's store.

    A process that is killed breaks its connections, so the others fail in their next exchange; `missing` then
    names the process. A process that is stopped or hangs breaks nothing: the others would wait for hours.
    After `patience` seconds without a sign of life the thread therefore ends its own process.
    """

    def __init__(self, store: Store, rank: int, size: int, *, patience: float) -> None:
        self._store = store
        self._rank = rank
        self._others = [other for other in range(size) if other != rank]
        self._patience = patience
        # Where each process runs, and when it last gave a sign of life, on this process's own clock.
        self._place: dict[int, str] = {}
        self._seen = dict.fromkeys(self._others, time.monotonic())
        self._beats = dict.fromkeys(self._others, b"")
        # The beginning of the request to the store that has not been answered, or the first that failed.
        self._unanswered_since: float | None = None
        self._leaving = threading.Event()
        store.set(_place_key(rank), json.dumps([socket.gethostname(), os.getpid()]))
        # Two threads, because a store whose process is stopped never answers the first one.
        self._beating = threading.Thread(target=self._beat_on, name="rank watch: beats", daemon=True)
        self._beating.start()
        threading.Thread(target=self._watch_on, name="rank watch", daemon=True).start()

    def close(self) -> None:
        """Ends the thread. Leaves a mark for the other processes, which then do not take this one for lost."""
        self._leaving.set()
        self._beating.join(timeout=5)

    def lost(self) -> ProcessLost:
        """Returns the error to raise after an exchange with the other processes has failed.

        Waits some seconds for the signs of life, to name the process that is missing.
        """
        end = time.monotonic() + _MISSED + 2 * _BEAT
        while not (missing := self.missing()) and time.monotonic() < end:
            time.sleep(_BEAT)
        return ProcessLost(self._message(missing))

    def missing(self, after: float = _MISSED) -> list[int]:
        """Returns the ranks without a sign of life for `after` seconds."""
        now = time.monotonic()
        unanswered_since = self._unanswered_since
        if unanswered_since is not None and now - unanswered_since > after:
            # The process of rank 0, or its launcher, holds the store.
            return [0] if 0 in self._seen else []
        return [rank for rank, seen in self._seen.items() if now - seen > after]

    def is_first_left(self, missing: list[int]) -> bool:
        """Returns True in the process with the lowest rank of those that are left; it reports for all."""
        return all(other in missing or other > self._rank for other in self._others)

    def _message(self, missing: list[int]) -> str:
        if not missing:
            return (
                "the connection to the other processes failed, although all of them respond; see the messages of the"
                " launcher. The last checkpoint is complete: start again with --resume"
            )
        named = " and ".join(f"process {rank}{self._place.get(rank, '')}" for rank in missing)
        return (
            f"{named} of {len(self._others) + 1} ended or stopped responding. The last checkpoint is complete: start"
            " again with --resume"
        )

    def _watch_on(self) -> None:
        while not self._leaving.wait(_BEAT):
            if missing := self.missing(self._patience):
                self._end(missing)

    def _beat_on(self) -> None:
        beats = 0
        while not self._leaving.wait(_BEAT):
            beats += 1
            self._beat(str(beats).encode())
        self._beat(b"left")

    def _beat(self, beat: bytes) -> None:
        """Gives a sign of life, and reads those of the others."""
        now = time.monotonic()
        if self._unanswered_since is None:
            self._unanswered_since = now
        try:
            self._store.set(_beat_key(self._rank), beat.decode())
            for other in self._others:
                if not self._store.check([_beat_key(other)]):
                    continue
                found = self._store.get(_beat_key(other))
                if found != self._beats[other] or found == b"left":
                    self._beats[other], self._seen[other] = found, now
                if other not in self._place:
                    host, pid = json.loads(self._store.get(_place_key(other)))
                    self._place[other] = f" (on {host}, process id {pid})"
            self._unanswered_since = None
        except (RuntimeError, OSError):
            return

    def _end(self, missing: list[int]) -> None:
        """Ends the process: its main thread waits for a process that does not respond, and cannot be woken."""
        if self.is_first_left(missing):
            print(f"error: {self._message(missing)}", file=sys.stderr, flush=True)
        os._exit(ProcessLost.exit_code)


def wait(is_done: Callable[[], bool]) -> None:
    """Waits in Python for an exchange to finish: unlike torch's own wait, signals interrupt it."""
    pause = 1e-5
    while not is_done():
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def open_store(rank: int, size: int, timeout: timedelta) -> Store:
    """Connects to the store that the launcher's variables MASTER_ADDR and MASTER_PORT name."""
    store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=timeout)))
    store.set_timeout(timeout)
    return store


def _beat_key(rank: int) -> str:
    return f"halfbyte/beat/{rank}"


def _place_key(rank: int) -> str:
    return f"halfbyte/place/{rank}"
