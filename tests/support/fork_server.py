"""Runs programs in forks of a process that has already imported stock diffusers, whose import takes seconds.

As a program, it answers each line of JSON on stdin, one program to run, with one line that holds its exit code.
"""

import gc
import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REAL_RUN = subprocess.run


class ForkServer:
    """Starts the process on first use. Replaces `subprocess.run` while it is entered as a context manager.

    It takes over the commands `python -P PROGRAM ARGUMENTS` only, which is how the export's self-check starts its
    programs. The process has imported nothing of halfbyte, so a fork runs them as a fresh process would.
    """

    def __init__(self, work: Path) -> None:
        """work: an empty folder for the output of the programs."""
        self._work = work
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> None:
        subprocess.run = self._run  # type: ignore[assignment]

    def __exit__(self, *error: object) -> None:
        subprocess.run = REAL_RUN
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(timeout=60)

    def _run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if list(command[:2]) != [sys.executable, "-P"]:
            return REAL_RUN(command, **options)
        return self._forked(command, options.get("env") or os.environ, str(options.get("cwd") or Path.cwd()))

    def _forked(
        self, command: Sequence[str], env: Mapping[str, str], cwd: str
    ) -> subprocess.CompletedProcess[str]:
        if self._process is None:
            start = [sys.executable, "-P", __file__]
            self._process = subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        out, err = self._work / "stdout", self._work / "stderr"
        order = {"arguments": command[2:], "env": dict(env), "cwd": cwd, "out": str(out), "err": str(err)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the fork server has ended"
        return subprocess.CompletedProcess(
            list(command), json.loads(answer), out.read_text(), err.read_text()
        )


def _serve() -> None:
    # The libraries that the programs in trainer/export/stock import, bitsandbytes by way of diffusers.
    gc.disable()
    import bitsandbytes  # noqa: F401
    import diffusers.loaders.peft
    import diffusers.loaders.single_file_utils
    import diffusers.models.transformers  # noqa: F401
    import peft  # noqa: F401
    from transformers import T5EncoderModel  # noqa: F401

    gc.freeze()
    gc.enable()
    # From here on, anything printed to stdout goes to stderr, so that it cannot be read as an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_run_program(order))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def _run_program(order: dict[str, Any]) -> int:
    """Runs `arguments` as `python -P` does, in the forked process; returns the exit code."""
    for descriptor, file in ((1, order["out"]), (2, order["err"])):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    sys.argv = list(order["arguments"])
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    _serve()
