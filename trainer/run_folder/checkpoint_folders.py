"""Finds, verifies, deletes and recovers the folders of checkpoints.

A checkpoint is sound if its manifest lists every file that belongs to it and each file has the listed SHA-256.
"""

import logging
import re
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from halfbyte.quant.files.atomic import flush, recover_all, remove_folder
from halfbyte.quant.files.digest import sha256_file, sha256_of
from halfbyte.trainer.adapters.listed_digests import CHECKPOINT_NAME, MANIFEST, read_manifest
from halfbyte.trainer.adapters.saved import ADAPTER_FILE
from halfbyte.trainer.errors import DiskError, RecipeError

log = logging.getLogger(__name__)

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
TRAINED_FILE = "trained_lora_weights.safetensors"
_REQUIRED = (ADAPTER_FILE, OPTIMIZER_FILE, STATE_FILE)
# Left by a process that was killed while it saved a step again; without `.halfbyte` by version 0.2 or older.
_REPLACED = re.compile(r"\.(step-\d{6,})(?:\.halfbyte)?\.old")
_LEFT_WORK = re.compile(r"\.step-\d{6,}\.tmp")

# Folder -> (state of its files, the fault): what this process wrote or verified, so that it reads gigabytes once.
_verified: dict[Path, tuple[object, str | None]] = {}
_named: set[Path] = set()  # the damaged ones that a warning has named


def name_of(step: int) -> str:
    """Returns the name of a checkpoint's folder."""
    return f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """Returns the step of a checkpoint's folder."""
    match = CHECKPOINT_NAME.search(folder.name)
    assert match is not None
    return int(match.group(1))


def folders(root: Path) -> list[Path]:
    """Returns the folders of all finished checkpoints, oldest first; some may be damaged."""
    if not root.is_dir():
        return []
    return sorted(
        (p for p in root.iterdir() if CHECKPOINT_NAME.fullmatch(p.name) and p.is_dir()), key=step_of
    )


def newest_sound(root: Path) -> Path | None:
    """Returns the newest sound checkpoint, and warns about damaged newer ones; None if there is none."""
    return next(_sound(root), None)


def is_unusable(root: Path) -> bool:
    """Returns True if there are checkpoints, but no sound one."""
    return bool(_candidates(root)) and newest_sound(root) is None


def refusal(root: Path) -> RecipeError:
    """Returns the error about checkpoints of which none is sound."""
    faults = "\n  ".join(f"{folder.name}: {fault_of(folder)}" for folder in _candidates(root))
    return RecipeError(
        f"--resume: {root} has no usable checkpoint:\n  {faults}\nPut back an intact copy of one of them. To start"
        f" again at step 0, move {root} to another place"
    )


def prune(root: Path, keep: int) -> None:
    """Deletes old checkpoints so that the newest `keep` sound ones are left; damaged ones are not deleted."""
    if len(folders(root)) <= keep:
        return
    for folder in list(_sound(root))[keep:]:
        remove_folder(folder)


def note_written(folder: Path) -> None:
    """Remembers that this process has written a checkpoint, so that it is sound."""
    _verified[folder] = (_state(folder), None)


def fault_of(folder: Path) -> str | None:
    """Verifies a checkpoint; returns what is wrong with it, or None. Reads its files if they are not known yet."""
    try:
        state = _state(folder)
        if folder not in _verified or _verified[folder][0] != state:
            _verified[folder] = (state, _find_fault(folder))
    except OSError as error:
        return f"cannot be read: {error}"
    return _verified[folder][1]


def recover_checkpoints(root: Path) -> None:
    """Undoes what a killed process left: puts replaced checkpoints back where needed, and deletes work files.

    No other process may be writing checkpoints. A damaged checkpoint whose replaced one is sound is moved aside.
    """
    if not root.is_dir():
        return
    for left in sorted(root.iterdir()):
        replaced = _REPLACED.fullmatch(left.name)
        if _LEFT_WORK.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True)
        elif replaced is not None:
            _put_back(left, root / replaced[1])
    flush(root)
    recover_all(root)


def copy_adapter(checkpoints: Path, step: int | None, copies: Path) -> str:
    """Copies a checkpoint's adapter into `copies`, checks it, and returns the checkpoint's name.

    step: the checkpoint to use; None for the newest undamaged one.

    Raises:
        RecipeError: there is no such checkpoint, or it is damaged.
        DiskError: `copies` cannot be written.
    """
    saved = _candidates(checkpoints)
    if not saved:
        raise RecipeError(
            f"{checkpoints.parent}: has no checkpoint yet; the first is saved after checkpoint.every steps"
        )
    if step is not None:
        names = ", ".join(dict.fromkeys(str(step_of(folder)) for folder in reversed(saved)))
        saved = [folder for folder in saved if step_of(folder) == step]
        if not saved:
            raise RecipeError(
                f"--checkpoint: {checkpoints.parent} has no checkpoint of step {step}; it has {names}"
            )
    for folder in saved:
        fault = _copy_whole(folder, copies / ADAPTER_FILE)
        if fault is None:
            return name_of(step_of(folder))
        log.warning("cannot use checkpoint %s: %s", folder, fault)
    raise RecipeError(
        f"{checkpoints}: {name_of(step_of(saved[0]))} is damaged, and there is no other checkpoint to use"
    )


def _candidates(root: Path) -> list[Path]:
    """Returns all folders that may hold a checkpoint, the newest first, each before the one it was to replace."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if CHECKPOINT_NAME.fullmatch(p.name) or _REPLACED.fullmatch(p.name)]
    return sorted((p for p in found if p.is_dir()), key=lambda p: (-step_of(p), p.name.startswith(".")))


def _sound(root: Path) -> Iterator[Path]:
    """Yields the newest sound checkpoint of each step, the newest first; warns about damaged ones, once each."""
    found: set[int] = set()
    for folder in _candidates(root):
        if step_of(folder) in found:
            continue
        fault = fault_of(folder)
        if fault is None:
            found.add(step_of(folder))
            yield folder
        elif folder not in _named:
            _named.add(folder)
            log.warning(
                "checkpoint %s is damaged (%s) and is not used; delete it when you like", folder, fault
            )


def _put_back(replaced: Path, folder: Path) -> None:
    if folder.is_dir() and fault_of(folder) is None:
        shutil.rmtree(replaced, ignore_errors=True)
    elif fault_of(replaced) is None:
        if folder.exists():
            names = (folder.with_name(f"{folder.name}.damaged-{number}") for number in count(1))
            aside = next(name for name in names if not name.exists())
            log.warning(
                "checkpoint %s is damaged; it is now %s, and an earlier one takes its place", folder, aside
            )
            folder.rename(aside)
        replaced.rename(folder)


def _state(folder: Path) -> object:
    """Returns what changes if a file of the folder is changed."""
    status = {file.name: file.stat() for file in sorted(folder.iterdir())}
    return [(name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in status.items()]


def _find_fault(folder: Path) -> str | None:
    digests = _manifest(folder)
    if isinstance(digests, str):
        return digests
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if sha256_file(file) != digest:
            return f"{name} does not match its checksum"
    return None


def _manifest(folder: Path) -> dict[str, str] | str:
    """Returns the digests of a checkpoint's files, or what is wrong with the manifest."""
    try:
        digests = read_manifest(folder)
    except ValueError as error:
        return str(error).removeprefix(f"{folder}/")
    present = (*_REQUIRED, *([TRAINED_FILE] if (folder / TRAINED_FILE).exists() else []))
    lacking = [name for name in present if name not in digests]
    return f"{MANIFEST} does not list {lacking[0]}" if lacking else digests


def _copy_whole(folder: Path, copy: Path) -> str | None:
    """Copies a checkpoint's adapter; returns what is wrong with it, or None. Raises DiskError."""
    digests = _manifest(folder)
    if isinstance(digests, str):
        return digests
    try:
        content = (folder / ADAPTER_FILE).read_bytes()
    except OSError as error:
        return f"it is incomplete: {error}"
    if sha256_of(content) != digests[ADAPTER_FILE]:
        return f"{ADAPTER_FILE} does not match its checksum"
    try:
        copy.write_bytes(content)
    except OSError as error:
        raise DiskError(
            f"{copy.parent}: cannot hold a copy of the checkpoint's adapter ({len(content) / 1e6:.0f} MB): {error};"
            " free space there, or set TMPDIR to another folder"
        ) from error
    return None
