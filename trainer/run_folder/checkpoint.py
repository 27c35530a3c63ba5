"""Checkpoints: the adapter, the optimizer and the position, whole or not there at all.

A checkpoint is a folder that is written beside its final name, synced to disk and renamed into place. Its
manifest holds the SHA-256 of every file. No pickle: tensors are safetensors, the rest is JSON. Random state is
not saved, for there is none (see `randomness`).
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte.quant.files.atomic import put_in_place, work_folder
from halfbyte.quant.files.digest import sha256_file
from halfbyte.trainer.adapters.saved import ADAPTER_FILE
from halfbyte.trainer.errors import RecipeError

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{6,})")
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"
_MANIFEST = "manifest.json"
TRAINED_FILE = "trained_lora_weights.safetensors"


@dataclass(frozen=True)
class Position:
    """How far a run is, in units that do not depend on what has to be redone."""

    step: int  # optimizer steps
    micro_batches: int  # global micro-batches
    global_batch: int  # samples in one global micro-batch


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, on the CPU."""

    folder: Path
    position: Position
    adapter: dict[str, Tensor]  # the weights that train
    optimizer: dict[str, Any]  # as torch's Optimizer.state_dict(), keyed by parameter names
    scaler: dict[str, Any]  # the gradient scaler's, empty but for float16
    average: dict[str, Tensor] | None = None  # of the weights, where a user is to see one in their place


def save_checkpoint(
    root: Path,
    position: Position,
    *,
    write_adapter: Callable[[str], None],
    optimizer: Mapping[str, Any],
    scaler: Mapping[str, Any],
) -> Path:
    """Writes `root/step-NNNNNN`; after a crash at any point either all of it is there or none.

    write_adapter: writes ADAPTER_FILE into the folder it is given, and TRAINED_FILE where that is an average and
    other weights train. optimizer: see `Checkpoint`.
    """
    target = root / f"step-{position.step:06d}"
    with work_folder(target) as work:
        write_adapter(str(work))
        tensors, scalars = _flatten(optimizer["state"])
        save_file(tensors, work / _OPTIMIZER)
        state = {
            "position": asdict(position),
            "optimizer_scalars": scalars,
            "param_groups": optimizer["param_groups"],
            "scaler": dict(scaler),
        }
        (work / _STATE).write_text(json.dumps(state, indent=1))
        digests = {file.name: sha256_file(file) for file in sorted(work.iterdir())}
        (work / _MANIFEST).write_text(json.dumps(digests, indent=1))
        put_in_place(work, target)
    return target


def newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are what its manifest says; damaged ones are named in a warning."""
    for folder in sorted(folders(root), key=_step, reverse=True):
        fault = _fault(folder)
        if fault is None:
            return _read(folder)
        log.warning("checkpoint %s is damaged (%s); looking for an older one", folder, fault)
    return None


def folders(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)), key=_step)


def prune(root: Path, keep: int) -> None:
    """Deletes all but the newest `keep`."""
    for folder in folders(root)[:-keep]:
        shutil.rmtree(folder)


def _names(optimizer: torch.optim.Optimizer) -> list[str]:
    """Of its parameters, as its state numbers them."""
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def named_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer of named parameters under their names, which, unlike numbers, fit or visibly do not."""
    state, names = optimizer.state_dict(), _names(optimizer)
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[i]: entry for i, entry in state["state"].items()}, "param_groups": groups}


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Puts a saved state back; raises ValueError when it belongs to other parameters, or groups them otherwise."""
    names = _names(optimizer)
    number = {name: i for i, name in enumerate(names)}
    listed = [name for group in saved["param_groups"] for name in group["params"]]
    if sorted(listed) != sorted(names):
        raise ValueError("the saved optimizer belongs to other parameters")
    own = [group["param_names"] for group in optimizer.param_groups]
    theirs = [group["params"] for group in saved["param_groups"]]
    if [sorted(group) for group in own] != [sorted(group) for group in theirs]:
        raise ValueError(
            f"the saved optimizer has its parameters in other groups: {_sizes(theirs)}, where this one has"
            f" {_sizes(own)}"
        )
    groups = [{**group, "params": [number[n] for n in group["params"]]} for group in saved["param_groups"]]
    state = {number[name]: entry for name, entry in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _sizes(groups: Sequence[Sequence[str]]) -> str:
    sizes = " and ".join(str(len(group)) for group in groups)
    return f"{len(groups)} group{'s' if len(groups) > 1 else ''} of {sizes} parameters"


def _flatten(state: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, entry in state.items():
        for field, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{field}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                scalars.setdefault(name, {})[field] = value
    return tensors, scalars


def _read(folder: Path) -> Checkpoint:
    state = json.loads((folder / _STATE).read_text())
    entries: dict[str, dict[str, Any]] = {n: dict(e) for n, e in state["optimizer_scalars"].items()}
    for path, tensor in load_file(folder / _OPTIMIZER).items():
        name, field = path.rsplit("/", 1)
        entries.setdefault(name, {})[field] = tensor
    adapter, average = _lora(folder / ADAPTER_FILE), None
    if (folder / TRAINED_FILE).is_file():
        adapter, average = _lora(folder / TRAINED_FILE), adapter
    optimizer = {"state": entries, "param_groups": state["param_groups"]}
    return Checkpoint(folder, Position(**state["position"]), adapter, optimizer, state["scaler"], average)


def _lora(file: Path) -> dict[str, Tensor]:
    return {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}


def _fault(folder: Path) -> str | None:
    try:
        digests = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{_MANIFEST}: {error}"
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if sha256_file(file) != digest:
            return f"{name} does not match its checksum"
    return None


def _step(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return int(match.group(1))


log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"


def copy_adapter(checkpoints: Path, step: int | None, copies: Path) -> str:
    """Copies a checkpoint's adapter into a folder, whole by its checksum; gives the checkpoint's name.

    Without `step` the newest that is whole. Raises RecipeError where there is none.
    """
    saved = folders(checkpoints)
    names = ", ".join(str(int(folder.name.removeprefix("step-"))) for folder in saved)
    if not saved:
        raise RecipeError(
            f"{checkpoints.parent}: has no checkpoint yet; the first comes after checkpoint.every steps"
        )
    if step is not None:
        saved = [folder for folder in saved if folder.name == f"step-{step:06d}"]
        if not saved:
            raise RecipeError(f"--checkpoint: {checkpoints.parent} has none of step {step}; it has {names}")
    for folder in reversed(saved):
        fault = _copy_whole(folder, copies / ADAPTER_FILE)
        if fault is None:
            return folder.name
        log.warning("checkpoint %s cannot be used: %s", folder, fault)
    raise RecipeError(f"{checkpoints}: {saved[-1].name} is damaged, and there is no other to take")


def _copy_whole(folder: Path, copy: Path) -> str | None:
    """What is wrong with the checkpoint, None where the copy is whole."""
    try:
        wanted = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))[ADAPTER_FILE]
        shutil.copyfile(folder / ADAPTER_FILE, copy)
    except (OSError, ValueError, KeyError) as error:
        return f"it is not whole: {error}"
    return None if sha256_file(copy) == wanted else f"{ADAPTER_FILE} does not match its checksum"
