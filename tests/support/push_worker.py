"""Runs `halfbyte` commands against a loopback Hub in a separate process.

The process is necessary because the client reads its endpoint only once. It reads the arguments of a command as a
line of JSON and writes its exit code, output and waits as another line. It is a fork of the test process, see
`nursery`; where there is none, this file is the program.
"""

import importlib
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO
from unittest import mock

import nursery
from runs import environment, free_port

ORDERS = "orders: "


@dataclass(frozen=True)
class Answer:
    """The result of a command."""

    code: int  # exit code
    output: str  # stdout, stderr and log lines
    waits: list[float]  # seconds that the command would have slept between retries


class PushWorker:
    """The worker process, as a context manager."""

    def __init__(self, endpoint: str, home: Path, token: str | None, *, xet: bool = False) -> None:
        """Starts the process.

        With `xet`, large files use Xet storage, whose client tries once and not for minutes.
        """
        env = environment() | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        del env["HF_HUB_OFFLINE"]
        env.pop("HF_TOKEN", None)
        if xet:
            del env["HF_HUB_DISABLE_XET"]
            env |= {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
            env |= {"HF_XET_TELEMETRY_ENABLED": "false"}
        home.mkdir(parents=True, exist_ok=True)
        self.stderr = home.with_name(f"{home.name}.stderr")
        self._process: subprocess.Popen[str] | None = None
        env |= {} if token is None else {"HF_TOKEN": token}
        if nursery.runs():
            self.stderr.touch()
            self._connection = nursery.fork("push_worker", env=env, stderr=str(self.stderr))
            self._orders: TextIO = self._connection.makefile("w")
            self._answers: TextIO = self._connection.makefile("r")
            return
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr.open("w"),
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout

    def run(self, *arguments: str, token: str | None = None, until: str | None = None) -> Answer:
        """Runs `halfbyte ARGUMENTS`.

        token: replaces HF_TOKEN; "" means no token. until: the path of a function that ends the command's work when
        it is called, as if it had returned True.
        """
        return Answer(**self._answer({"arguments": arguments, "token": token, "until": until}))

    def run_forked(self, *arguments: str) -> Answer:
        """Runs `halfbyte ARGUMENTS` in a fork of the worker, so that the worker's own state stays as it is."""
        (answer,) = self._answer({"arguments": arguments, "ranks": 1})
        return Answer(**answer)

    def run_ranks(self, number: int, *arguments: str) -> list[Answer]:
        """Runs `halfbyte ARGUMENTS` in `number` processes that train together, as torchrun would.

        They are forks of the worker. torch cannot train in a fork of a process that has trained, so call this
        only on a worker that has not.
        """
        return [Answer(**answer) for answer in self._answer({"arguments": arguments, "ranks": number})]

    def _answer(self, order: dict[str, Any]) -> Any:
        self._orders.write(json.dumps(order) + "\n")
        self._orders.flush()
        line = self._answers.readline()
        assert line, "the worker is gone"
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._orders.close()
        if self._process is not None:
            self._process.wait(timeout=60)
            return
        self._connection.shutdown(socket.SHUT_WR)
        self._answers.read()  # until the process ends
        self._answers.close()
        self._connection.close()


def prepare() -> None:
    """Imports what the commands need."""
    from halfbyte.trainer.cli.console import library_imports

    with library_imports():
        from halfbyte.trainer import run  # noqa: F401
        from halfbyte.trainer.cli import app  # noqa: F401


def forked(orders: TextIO, answers: TextIO, env: dict[str, str], stderr: str) -> None:
    """Gives the forked process the environment of a new one."""
    import huggingface_hub

    os.environ.clear()
    os.environ.update(env)
    file = os.open(stderr, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    # The client has read its variables when it was imported.
    importlib.reload(huggingface_hub.constants)
    _serve(orders, answers)


def _serve(orders: TextIO, answers: TextIO) -> None:
    sys.stdout = sys.stderr
    import time

    from halfbyte.trainer.hub import client as hub_client

    waits: list[float] = []
    # Record the waits without sleeping, because the loopback Hub's faults end at once.
    time.sleep = waits.append
    hub_client.STALLED = 1.5
    for line in orders:
        order = json.loads(line)
        if "ranks" in order:
            answer: Any = _run_ranks(order["arguments"], order["ranks"], waits)
        else:
            if order["token"] is not None:
                os.environ["HF_TOKEN"] = order["token"]
            with nullcontext() if order["until"] is None else mock.patch(order["until"], return_value=True):
                answer = _run(order["arguments"], waits)
        print(json.dumps(answer), file=answers, flush=True)


def _run(arguments: Sequence[str], waits: list[float]) -> dict[str, Any]:
    """Runs a command; returns the fields of an Answer."""
    from huggingface_hub.utils import logging as client_logging
    from typer.testing import CliRunner

    from halfbyte.trainer.cli.app import app

    waits.clear()
    # Add everything that is logged to the output.
    logging.lastResort = None
    collector = _LogCollector()
    for name in ("", "huggingface_hub"):
        logging.getLogger(name).addHandler(collector)
    client_logging.disable_propagation()
    result = CliRunner().invoke(app, arguments)
    for name in ("", "huggingface_hub"):
        logging.getLogger(name).removeHandler(collector)
    output = result.output + "".join(f"log: {text}\n" for text in collector.lines)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        output += f"CRASHED: {result.exception!r}"
    return {"code": result.exit_code, "output": output, "waits": waits}


def _run_ranks(arguments: Sequence[str], number: int, waits: list[float]) -> list[dict[str, Any]]:
    """Runs a command in `number` forks with the environment of torchrun; returns the fields of their Answers."""
    port, size, readers = str(free_port()), str(number), []
    for rank in map(str, range(number)):
        read, write = os.pipe()
        if os.fork() == 0:
            if number > 1:
                os.environ |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with os.fdopen(write, "w") as pipe:
                json.dump(_run(arguments, waits), pipe)
            os._exit(0)
        os.close(write)
        readers.append(os.fdopen(read))
    answers = []
    for reader in readers:
        with reader:
            answers.append(json.load(reader))
        os.wait()
    return answers


class _LogCollector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


if __name__ == "__main__":
    prepare()
    _serve(sys.stdin, sys.stdout)
