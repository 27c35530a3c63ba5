"""`halfbyte` commands in one process beside the test, against a loopback Hub: the client reads its endpoint once.

As a program: answers a line of JSON, the arguments of a command, by one with its exit code, output and waits.
"""

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from runs import environment

ORDERS = "orders: "


@dataclass(frozen=True)
class Answer:
    """What a command did."""

    code: int
    output: str  # stdout and stderr
    waits: list[float]  # seconds that it would have slept between attempts


class PushWorker:
    """The process; a context manager."""

    def __init__(self, endpoint: str, home: Path, token: str | None, *, xet: bool = False) -> None:
        """With `xet` large files go by that protocol, whose client tries once instead of for minutes."""
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
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=env | ({} if token is None else {"HF_TOKEN": token}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr.open("w"),
            text=True,
        )

    def run(self, *arguments: str, token: str | None = None) -> Answer:
        """`halfbyte ARGUMENTS`, with another HF_TOKEN where one is given ("" for none)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"arguments": arguments, "token": token}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the worker is gone"
        return Answer(**json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def _serve() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    import time

    from huggingface_hub.utils import logging as client_logging
    from typer.testing import CliRunner

    from halfbyte.trainer.cli.app import app
    from halfbyte.trainer.hub import client as hub_client

    waits: list[float] = []
    # A test need not wait for what passes at once.
    time.sleep = waits.append
    hub_client.STALLED = 1.5
    for line in sys.stdin:
        order = json.loads(line)
        waits.clear()
        if order["token"] is not None:
            os.environ["HF_TOKEN"] = order["token"]
        # Whatever is logged goes where the command writes.
        runner = CliRunner()
        logging.lastResort = None
        heard = _Heard()
        for name in ("", "huggingface_hub"):
            logging.getLogger(name).addHandler(heard)
        client_logging.disable_propagation()
        result = runner.invoke(app, order["arguments"])
        for name in ("", "huggingface_hub"):
            logging.getLogger(name).removeHandler(heard)
        output = result.output + "".join(f"log: {text}\n" for text in heard.lines)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            output += f"CRASHED: {result.exception!r}"
        print(
            json.dumps({"code": result.exit_code, "output": output, "waits": waits}), file=answers, flush=True
        )


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


if __name__ == "__main__":
    _serve()
