"""Recognizes errors of a disk that is full or cannot be written, whichever library reports them."""

import errno
import os
import re

from safetensors import SafetensorError

# What a user can change: space, quota, permissions, a vanished or read-only mount.
_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EMFILE,
    errno.ENFILE,
)
# safetensors and torch report the system's error only as text, such as "No space left on device (os error 28)".
_NUMBER = re.compile(r"\(os error (\d+)\)")
_TEXTS = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))


def disk_fault(error: BaseException, *, again: str = "repeat the command") -> str | None:
    """Returns a message for an error of the disk, or None for any other error.

    Also looks at the errors that `error` was raised from or while handling. again: the last step of the advice.
    """
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        if (message := _message(current)) is not None:
            advice = f"Free space or change the folder, then {again}"
            return f"{message}. Nothing that was saved before is lost. {advice}"
        current = current.__cause__ or current.__context__
    return None


def _message(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in _ERRORS:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    if isinstance(error, (SafetensorError, RuntimeError)):
        text = str(error)
        found = _NUMBER.search(text)
        if found is not None and int(found[1]) in _ERRORS:
            return os.strerror(int(found[1]))
        return next((known for known in _TEXTS if known in text), None)
    return None
