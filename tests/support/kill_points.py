"""Kills a forked process before and after each operation on files, to see what a crash at that point leaves.

A killed process runs no `finally`, flushes no buffer and leaves its threads: here it ends with `os._exit`. Forking is
cheap, because the parent has imported and loaded everything. An action that computes with torch needs one thread.
"""

import builtins
import contextlib
import io
import json
import os
import random
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch

from halfbyte.quant.files import atomic
from halfbyte.trainer.runtime.background import THREAD_NAME

from soak import tries

Action = Callable[[], object]

_KILLED = 77
_OPERATIONS: Sequence[tuple[Any, str]] = (
    *(
        (os, name)
        for name in ("rename", "replace", "unlink", "remove", "mkdir", "rmdir", "link", "fsync", "truncate")
    ),
    (atomic, "exchange"),
    (safetensors.torch, "serialize_file"),
)


class _Points:
    """Counts the points that the process passes; ends it at one of them."""

    def __init__(self, kill_at: int | None, *, exchange: bool) -> None:
        self.passed: list[str] = []
        self._lock = threading.Lock()
        self._kill_at = kill_at
        if not exchange:
            atomic.exchange = lambda one, other: False
        for module, name in _OPERATIONS:
            setattr(module, name, self._around(name, getattr(module, name)))
        opened = self._around("open", builtins.open, when=_is_written)
        builtins.open = io.open = opened

    def _around(
        self, name: str, operation: Callable[..., Any], when: Callable[..., bool] = lambda *_, **__: True
    ) -> Any:
        def operate(*arguments: Any, **options: Any) -> Any:
            # Not the threads of libraries, whose operations differ in number from one run to the next.
            ours = threading.current_thread() is threading.main_thread() or _is_writer()
            if not ours or not when(*arguments, **options):
                return operation(*arguments, **options)
            what = f"{name} {' '.join(os.path.basename(str(a)) for a in arguments[:2])}"
            self._pass(f"before {what}")
            result = operation(*arguments, **options)
            self._pass(f"after {what}")
            return result

        return operate

    def _pass(self, what: str) -> None:
        with self._lock:  # the writer of checkpoints passes its points while the main thread passes others
            if len(self.passed) == self._kill_at:
                os._exit(_KILLED)
            self.passed.append(what)


def _is_writer() -> bool:
    return threading.current_thread().name == THREAD_NAME


def points(action: Action, *, exchange: bool = True) -> list[str]:
    """Runs an action to its end in a forked process; returns what it does at each of its points.

    exchange: False to behave like a filesystem that cannot exchange two folders.
    """
    code, passed = _forked(action, None, exchange=exchange)
    assert code == 0, "the action failed; its traceback is above"
    return passed


def kill(action: Action, point: int, *, exchange: bool = True) -> None:
    """Runs an action in a forked process that is killed at one of its points."""
    code, _ = _forked(action, point, exchange=exchange)
    assert code == _KILLED, f"the action was not killed, but ended with {code}"


def sample(found: Sequence[str], count: int, *, after: Sequence[str] = ()) -> Iterator[int]:
    """Yields `count` points, spread over all of them; all where the environment asks for the long form.

    after: operations after each of which is always a point, because a fault there is likely.
    """
    if tries("ALL_KILL_POINTS", 0) or count >= len(found):
        yield from range(len(found))
        return
    draws = random.Random(0)
    chosen = {
        draws.randrange(part * len(found) // count, (part + 1) * len(found) // count) for part in range(count)
    }
    always = tuple(f"after {operation} " for operation in after)
    yield from sorted(chosen | {point for point, what in enumerate(found) if what.startswith(always)})


def tree(folder: Path) -> dict[str, bytes]:
    """Returns the content of all files below a folder, by relative path; empty folders and links are included."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            entries[name] = b"-> " + os.fsencode(os.readlink(path))
        elif path.is_file():
            entries[name] = path.read_bytes()
        elif path.is_dir() and not any(path.iterdir()):
            entries[name] = b"empty folder"
    return entries


def leftovers(folder: Path) -> list[str]:
    """Returns the work files below a folder that a killed process left."""
    return [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob(".*"))
        if path.name.endswith((".tmp", ".old", ".partial"))
    ]


def _forked(action: Action, kill_at: int | None, *, exchange: bool) -> tuple[int, list[str]]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            code = _run(action, _Points(kill_at, exchange=exchange), writer)
        os._exit(code)
    os.close(writer)
    with open(reader, "rb") as answer:
        passed = answer.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), json.loads(passed or b"[]")


def _run(action: Action, counted: _Points, answer: int) -> int:
    try:
        action()
    except BaseException:
        traceback.print_exc()
        return 1
    passed = list(counted.passed)
    with os.fdopen(answer, "w") as stream:
        stream.write(json.dumps(passed))
    return 0


def _is_written(file: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
    return not isinstance(file, int) and any(letter in mode for letter in "wax+")
