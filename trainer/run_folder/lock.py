"""Locks the folder of a run, so that two processes never write into it at once."""

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.trainer.errors import DiskError, RecipeError

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
"""The file in a run's folder that the run holds a lock on while it trains."""

EXPORT_LOCK_FILE = ".export.lock"
"""The file in a run's folder that an export holds a lock on while it writes."""

LOCK_FILES = (LOCK_FILE, EXPORT_LOCK_FILE)


@contextmanager
def lock_run(root: Path) -> Iterator[None]:
    """Holds the lock of the run at `root`, which is made if it does not exist; at the end, removes what it made.

    The system frees the lock when the process ends, however it ended, so no lock is ever left behind.

    Raises:
        RecipeError: another process holds the lock; the message names it. Or `root` is a file.
        DiskError: the folder cannot be written.
    """
    if root.exists() and not root.is_dir():
        raise RecipeError(f"output.dir: {root} is a file; expected a folder")
    made = _missing_folders(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = _Lock(root / LOCK_FILE)
        held = lock.take()
    except OSError as error:
        _remove_empty(made)
        raise DiskError(
            f"output.dir: {root} cannot be written: {error.strerror}; choose another folder, such as"
            " output.dir=runs/other"
        ) from error
    if not held:
        raise RecipeError(
            f"output.dir: {root} is in use by {lock.holder()}. Wait until that run ends or stop it, or choose another"
            " folder, such as output.dir=runs/other"
        )
    try:
        yield
    finally:
        lock.release()
        _remove_empty(made)


@contextmanager
def lock_exports(root: Path) -> Iterator[None]:
    """Holds the lock on the exports in `root`; waits while another process exports into the same folder."""
    made = _missing_folders(root)
    root.mkdir(parents=True, exist_ok=True)
    lock = _Lock(root / EXPORT_LOCK_FILE)
    if not lock.take():
        log.info("waiting for %s, which exports into %s", lock.holder(), root)
        while not lock.take():
            time.sleep(0.2)
    try:
        yield
    finally:
        lock.release()
        _remove_empty(made)


class _Lock:
    """An exclusive lock on a file that holds the host and id of the process that holds it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._descriptor: int | None = None

    def take(self) -> bool:
        """Takes the lock and returns True, or returns False if another process holds it. Raises OSError."""
        while True:
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            except OSError:
                os.close(descriptor)
                raise
            # The former holder removes the file before it frees the lock: then this lock is on a file without a
            # name, and another process could take a second one.
            if self._is_named(descriptor):
                break
            os.close(descriptor)
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")})
        os.ftruncate(descriptor, 0)
        os.write(descriptor, text.encode())
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Removes the file and frees the lock."""
        assert self._descriptor is not None
        self._file.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

    def holder(self) -> str:
        """Describes the process that holds the lock."""
        try:
            known = json.loads(self._file.read_text(encoding="utf-8"))
            return f"process {known['pid']} on {known['host']}, since {known['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def _is_named(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self._file.stat())
        except FileNotFoundError:
            return False


def _missing_folders(folder: Path) -> list[Path]:
    """Returns the folders that making `folder` would make, the innermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # not empty, or never made
            return
