"""Starts halfbyte's commands as processes that are forked from one process with all libraries imported.

A command spends most of a short run on importing libraries. Tests of signals, ranks and crashes need real processes,
but not their imports. The server answers each line of JSON by forking a process that runs one command; `Command` is
the other side. The server itself is a fork of the test process, see `nursery`; where there is none, it is a program.

The forks come from a process that has never computed a gradient: torch's autograd refuses to run in a fork of one
that has.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any, TextIO

import nursery
from runs import environment, free_port

_POLL = 0.02  # seconds
_STARTS = 240  # seconds that the imports of the forked process may take on a busy machine


# For `before`: steps of a fifth of a second, so that a signal arrives before a run of some seconds ends.
SLOW_STEPS = """
import time
from halfbyte.trainer.training.module import DiffusionModule
real = DiffusionModule.loss
DiffusionModule.loss = lambda *given: (time.sleep(0.2), real(*given))[1]
"""


class Command:
    """A running `halfbyte ARGUMENTS`, in a process of its own."""

    def __init__(self, order: Path) -> None:
        self._order = order
        self.pid = int(_content(order.with_suffix(".pid"), _STARTS))

    @property
    def output(self) -> str:
        """Returns what the process has written to stdout so far."""
        return self._order.with_suffix(".out").read_text()

    @property
    def errors(self) -> str:
        """Returns what the process has written to stderr so far."""
        return self._order.with_suffix(".err").read_text()

    def poll(self) -> int | None:
        """Returns the exit code (negative: the signal that ended the process), or None while it runs."""
        code = self._order.with_suffix(".code")
        return int(code.read_text()) if code.exists() else None

    def wait(self, timeout: float = 120) -> int:
        """Returns the exit code. A process that takes longer than `timeout` seconds is killed and fails the test."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"still running after {timeout} s\n{self.output}\n{self.errors}")
            time.sleep(_POLL)
        return code

    def wait_for(self, path: Path, timeout: float = 120) -> None:
        """Waits until `path` exists."""
        self._until(path.exists, f"no {path}", timeout)

    def wait_for_output(self, text: str, timeout: float = 120) -> None:
        """Waits until stdout contains `text`."""
        self._until(lambda: text in self.output, f"no {text!r} in the output", timeout)

    def send(self, number: int) -> None:
        """Sends a signal to the process."""
        os.kill(self.pid, number)

    def _until(self, holds: Callable[[], bool], failure: str, timeout: float) -> None:
        end = time.monotonic() + timeout
        while not holds():
            assert self.poll() is None, f"ended with {self.poll()}\n{self.output}\n{self.errors}"
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"{failure} after {timeout} s\n{self.output}\n{self.errors}")
            time.sleep(_POLL)


class RunServer:
    """The process that commands are forked from, started on first use. A context manager."""

    def __init__(self, work: Path) -> None:
        """work: an empty folder for the output of the commands."""
        self._work = work
        self._numbers = count()
        self._process: subprocess.Popen[str] | None = None
        self._orders: TextIO | None = None

    def start(self, *arguments: str, environ: Mapping[str, str] | None = None, before: str = "") -> Command:
        """Starts `halfbyte ARGUMENTS`.

        environ: variables in addition to those of `environment`. before: Python code that the process executes
        first, for tests that must observe or slow down a run.
        """
        order = self._work / f"{next(self._numbers):04d}.json"
        message = {"arguments": arguments, "env": dict(environ or {}), "before": before, "order": str(order)}
        orders = self._started()
        orders.write(json.dumps(message) + "\n")
        orders.flush()
        return Command(order)

    def start_ranks(
        self, number: int, *arguments: str, environ: Mapping[str, str] | None = None, before: str = ""
    ) -> list[Command]:
        """Starts one command in several processes that train together, as torchrun would."""
        ranks = str(number)
        shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        shared["MASTER_PORT"] = str(free_port())
        return [
            self.start(
                *arguments,
                environ=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | dict(environ or {}),
                before=before,
            )
            for rank in range(number)
        ]

    def __enter__(self) -> "RunServer":
        return self

    def __exit__(self, *error: object) -> None:
        if self._orders is not None:
            self._orders.close()
        if self._process is not None:
            self._process.wait(timeout=60)

    def _started(self) -> TextIO:
        if self._orders is not None:
            return self._orders
        if nursery.runs():
            with nursery.fork("run_server", env=environment()) as connection:
                self._orders = connection.makefile("w")
        else:
            self._process = subprocess.Popen(
                [sys.executable, __file__], env=environment(), stdin=subprocess.PIPE, text=True
            )
            assert self._process.stdin is not None
            self._orders = self._process.stdin
        return self._orders


def _content(path: Path, timeout: float) -> str:
    end = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < end, f"no {path} after {timeout} s"
        time.sleep(_POLL)
    return path.read_text()


def prepare() -> None:
    """Imports what the commands need."""
    from halfbyte.trainer.cli.console import library_imports

    with library_imports():
        import torch

        from halfbyte.trainer import run, sample  # noqa: F401
        from halfbyte.trainer.cli import app  # noqa: F401
    torch.set_num_threads(1)


def forked(orders: TextIO, answers: TextIO, env: dict[str, str]) -> None:
    """Forks a process for each order."""
    os.environ.clear()
    os.environ.update(env)
    # The keepers end by themselves.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in orders:
        if os.fork() == 0:
            _keep(json.loads(line))
            os._exit(0)


def _keep(order: dict[str, Any]) -> None:
    """Forks the command's process, and writes its id, then its exit code, next to the order's file."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    file = Path(order["order"])
    for ending in (".out", ".err"):
        file.with_suffix(ending).touch()
    pid = os.fork()
    if pid == 0:
        os._exit(_command(order, file))
    _put(file.with_suffix(".pid"), str(pid))
    _, status = os.waitpid(pid, 0)
    _put(file.with_suffix(".code"), str(os.waitstatus_to_exitcode(status)))


def _put(path: Path, text: str) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _command(order: dict[str, Any], file: Path) -> int:
    """Runs the command in this process, as the installed script would; returns its exit code."""
    # As in a terminal, also if the tests run where some signals are ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    for descriptor, ending in ((1, ".out"), (2, ".err")):
        opened = os.open(file.with_suffix(ending), os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.update(order["env"])
    tempfile.tempdir = None  # TMPDIR may be another one now
    sys.argv = ["halfbyte", *order["arguments"]]
    code: object = 0
    try:
        exec(order["before"], {})
        from halfbyte.trainer.cli.main import main

        main()
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    prepare()
    forked(sys.stdin, sys.stdout, dict(os.environ))
