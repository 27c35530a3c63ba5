"""Forks processes from a copy of the test process that was made before any test ran.

The copy has imported everything that the tests need, which takes a new process fifteen seconds, and it has never
computed a gradient: torch's autograd refuses to run in a fork of a process that has.
"""

import contextlib
import faulthandler
import gc
import importlib
import io
import json
import logging
import os
import signal
import socket
import sys
import traceback
from typing import Any

_ORDER = 1 << 20  # bytes; an order holds an environment

_to_copy: socket.socket | None = None
_copy: int | None = None  # its process id


def start() -> None:
    """Makes the copy."""
    global _to_copy, _copy
    _to_copy, own = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _copy = os.fork()
    if _copy == 0:
        try:
            _serve(own)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    own.close()


def stop() -> None:
    """Waits until the copy and the processes that were forked from it have ended."""
    global _to_copy, _copy
    if _to_copy is not None and _copy is not None:
        _to_copy.close()
        os.waitpid(_copy, 0)
    _to_copy = _copy = None


def runs() -> bool:
    """Returns True between `start` and `stop`."""
    return _to_copy is not None


def fork(module: str, **arguments: Any) -> socket.socket:
    """Calls `module.forked(orders, answers, **arguments)` in a new process, with text streams to this process.

    Returns this process's end of the connection; the other end sees the end of its orders when it is closed.
    """
    assert _to_copy is not None
    ours, theirs = socket.socketpair()
    with theirs:
        order = json.dumps({"module": module, "arguments": arguments}).encode()
        socket.send_fds(_to_copy, [order], [theirs.fileno()])
    return ours


def _serve(orders: socket.socket) -> None:
    _leave_test_process(orders.fileno())
    while True:
        order, descriptors, *_ = socket.recv_fds(orders, _ORDER, 1)
        if not order:
            break
        # Imported before the fork, so that each fork has it.
        module = importlib.import_module(json.loads(order)["module"])
        module.prepare()
        if os.fork() == 0:
            orders.close()
            _run(module, json.loads(order)["arguments"], descriptors[0])
        os.close(descriptors[0])
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def _leave_test_process(keep: int) -> None:
    """Detaches from the test process's files, except the descriptor `keep`, and undoes what pytest has set for it."""
    faulthandler.disable()
    gc.enable()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        # Never closed: an object that still writes to the descriptor would write into the next file that is opened.
        if descriptor not in (1, 2, null, keep):
            with contextlib.suppress(OSError):  # the one of the listing itself
                os.fstat(descriptor)
                os.dup2(null, descriptor)
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, mode, closefd=False), line_buffering=True)
        for number, mode in enumerate(("r", "w", "w"))
    )
    logging.getLogger().handlers.clear()
    for logger in logging.Logger.manager.loggerDict.values():
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setStream(sys.stderr)


def _run(module: Any, arguments: dict[str, Any], descriptor: int) -> None:
    try:
        with socket.socket(fileno=descriptor) as connection:
            module.forked(connection.makefile("r"), connection.makefile("w"), **arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)
