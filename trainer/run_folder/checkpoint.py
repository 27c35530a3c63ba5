"""Checkpoints: atomic snapshots of the adapter, the optimizer and the position in the run.

A checkpoint is a folder that is written next to its final place, synced to disk and then renamed, so it is
either complete or absent. Its manifest has the SHA-256 of every file. Nothing is pickled: tensors are
safetensors, and the rest is JSON. There is no random state to save (see `randomness`).
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
    """The progress of a run, in units that do not depend on the number of processes."""

    step: int  # optimizer steps
    micro_batches: int  # micro-batches; all processes together take one
    global_batch: int  # samples in one micro-batch, over all processes


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint; all tensors are on the CPU."""

    folder: Path
    position: Position
    adapter: dict[str, Tensor]  # the trained weights
    optimizer: dict[str, Any]  # torch's Optimizer.state_dict(), but keyed by parameter names
    scaler: dict[str, Any]  # state of the gradient scaler; empty unless the run is in float16
    average: dict[str, Tensor] | None = None  # the average of the weights that users see; None without one


def save_checkpoint(
    root: Path,
    position: Position,
    *,
    write_adapter: Callable[[str], None],
    optimizer: Mapping[str, Any],
    scaler: Mapping[str, Any],
) -> Path:
    """Writes `root/step-NNNNNN` atomically: after a crash at any point, it is complete or absent.

    write_adapter: writes ADAPTER_FILE into the given folder; if that is an average, also the trained weights
    as TRAINED_FILE. optimizer, scaler: see `Checkpoint`.
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
    """Reads the newest undamaged checkpoint, and warns about damaged ones; None if there is none."""
    for folder in sorted(folders(root), key=_step, reverse=True):
        fault = _fault(folder)
        if fault is None:
            return _read(folder)
        log.warning("checkpoint %s is damaged (%s); trying an older one", folder, fault)
    return None


def folders(root: Path) -> list[Path]:
    """Returns the folders of all finished checkpoints, oldest first."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)), key=_step)


def prune(root: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints."""
    for folder in folders(root)[:-keep]:
        shutil.rmtree(folder)


def _names(optimizer: torch.optim.Optimizer) -> list[str]:
    """Returns the names of an optimizer's parameters, in the order in which its state numbers them."""
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def named_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the state of an optimizer of named parameters, keyed by their names.

    torch numbers the parameters, so the state of another model could be loaded unnoticed. Names make that an
    error.
    """
    state, names = optimizer.state_dict(), _names(optimizer)
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[i]: entry for i, entry in state["state"].items()}, "param_groups": groups}


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Restores a saved state into an optimizer.

    Raises:
        ValueError: the state has other parameters, or has them in other groups.
    """
    names = _names(optimizer)
    number = {name: i for i, name in enumerate(names)}
    listed = [name for group in saved["param_groups"] for name in group["params"]]
    if sorted(listed) != sorted(names):
        raise ValueError("the saved optimizer has other parameters")
    own = [group["param_names"] for group in optimizer.param_groups]
    theirs = [group["params"] for group in saved["param_groups"]]
    if [sorted(group) for group in own] != [sorted(group) for group in theirs]:
        raise ValueError(
            f"the saved optimizer groups its parameters differently: it has {_sizes(theirs)}, but this run has"
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


def copy_adapter(checkpoints: Path, step: int | None, copies: Path) -> str:
    """Copies a checkpoint's adapter into `copies`, checks it, and returns the checkpoint's name.

    step: the checkpoint to use; None for the newest undamaged one.

    Raises:
        RecipeError: there is no such checkpoint, or it is damaged.
    """
    saved = folders(checkpoints)
    names = ", ".join(str(int(folder.name.removeprefix("step-"))) for folder in saved)
    if not saved:
        raise RecipeError(
            f"{checkpoints.parent}: has no checkpoint yet; the first is saved after checkpoint.every steps"
        )
    if step is not None:
        saved = [folder for folder in saved if folder.name == f"step-{step:06d}"]
        if not saved:
            raise RecipeError(
                f"--checkpoint: {checkpoints.parent} has no checkpoint of step {step}; it has {names}"
            )
    for folder in reversed(saved):
        fault = _copy_whole(folder, copies / ADAPTER_FILE)
        if fault is None:
            return folder.name
        log.warning("cannot use checkpoint %s: %s", folder, fault)
    raise RecipeError(f"{checkpoints}: {saved[-1].name} is damaged, and there is no other checkpoint to use")


def _copy_whole(folder: Path, copy: Path) -> str | None:
    """Copies a checkpoint's adapter; returns what is wrong with it, or None."""
    try:
        wanted = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))[ADAPTER_FILE]
        shutil.copyfile(folder / ADAPTER_FILE, copy)
    except (OSError, ValueError, KeyError) as error:
        return f"it is incomplete: {error}"
    return None if sha256_file(copy) == wanted else f"{ADAPTER_FILE} does not match its checksum"
