"""Checkpoints: atomic snapshots of the adapter, the optimizer and the position in the run.

A checkpoint is a folder that is written next to its final place, synced to disk and then renamed, so it is
either complete or absent. Its manifest has the SHA-256 of every file. Nothing is pickled: tensors are
safetensors, and the rest is JSON. There is no random state to save (see `randomness`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte.quant.files.atomic import put_in_place, work_folder
from halfbyte.quant.files.digest import sha256_file
from halfbyte.trainer.adapters.listed_digests import MANIFEST
from halfbyte.trainer.adapters.saved import ADAPTER_FILE
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.run_folder.checkpoint_folders import (
    OPTIMIZER_FILE,
    STATE_FILE,
    TRAINED_FILE,
    folders,
    name_of,
    newest_sound,
    note_written,
    prune,
)
from halfbyte.trainer.run_folder.saved_state import Position, read_state

__all__ = [
    "TRAINED_FILE",
    "Checkpoint",
    "Position",
    "Snapshot",
    "folders",
    "named_optimizer_state",
    "newest",
    "optimizer_tensors",
    "prune",
    "restore_optimizer",
    "snapshot",
    "write_checkpoint",
]


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint; all tensors are on the CPU."""

    folder: Path
    position: Position
    adapter: dict[str, Tensor]  # the trained weights
    optimizer: dict[str, Any]  # torch's Optimizer.state_dict(), but keyed by parameter names
    scaler: dict[str, Any]  # state of the gradient scaler; empty unless the run is in float16
    skipped_steps: dict[str, int] = field(default_factory=dict)  # counts of the steps that were left out
    average: dict[str, Tensor] | None = None  # the average of the weights that users see; None without one


@dataclass(frozen=True)
class Snapshot:
    """The state of a run after a step, which no later step changes: all that a checkpoint is written from."""

    position: Position
    write_adapter: Callable[[str], None]  # see `snapshot`
    tensors: Mapping[str, Tensor]  # of the optimizer, on the host
    state: str  # the content of STATE_FILE


def on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies of tensors on the host."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def snapshot(
    position: Position,
    *,
    write_adapter: Callable[[str], None],
    optimizer: Mapping[str, Any],
    scaler: Mapping[str, Any],
    skipped_steps: Mapping[str, int] | None = None,
    copied: Callable[[dict[str, Tensor]], dict[str, Tensor]] = on_host,
) -> Snapshot:
    """Returns the state at this moment.

    write_adapter: writes ADAPTER_FILE into the given folder; if that is an average, also the trained weights
    as TRAINED_FILE. It is called later, so it must write copies. optimizer, scaler: see `Checkpoint`.
    skipped_steps: counts of the steps that were left out; None if the run takes every step.
    copied: copies the optimizer's tensors to the host.
    """
    tensors, scalars = _flatten(optimizer["state"])
    state = {
        "position": asdict(position),
        "optimizer_scalars": scalars,
        "param_groups": optimizer["param_groups"],
        "scaler": dict(scaler),
        **({} if skipped_steps is None else {"left_out": dict(skipped_steps)}),
    }
    return Snapshot(position, write_adapter, copied(tensors), json.dumps(state, indent=1))


def write_checkpoint(root: Path, snapshot: Snapshot) -> Path:
    """Writes `root/step-NNNNNN` atomically: after a crash at any point, it is complete or absent."""
    target = root / name_of(snapshot.position.step)
    with work_folder(target) as work:
        snapshot.write_adapter(str(work))
        save_file(dict(snapshot.tensors), work / OPTIMIZER_FILE)
        (work / STATE_FILE).write_text(snapshot.state)
        digests = {file.name: sha256_file(file) for file in sorted(work.iterdir())}
        (work / MANIFEST).write_text(json.dumps(digests, indent=1))
        put_in_place(work, target)
    note_written(target)
    return target


def newest(root: Path) -> Checkpoint | None:
    """Reads the newest sound checkpoint, and warns about damaged ones; None if there is none.

    Raises:
        RecipeError: the checkpoint's state is not what this version writes.
    """
    folder = newest_sound(root)
    return None if folder is None else _read(folder)


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


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the tensors of an optimizer's state, under the names that a checkpoint gives them."""
    return _flatten(named_optimizer_state(optimizer)["state"])[0]


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
        for part, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{part}"] = value
            else:
                scalars.setdefault(name, {})[part] = value
    return tensors, scalars


def _read(folder: Path) -> Checkpoint:
    state = read_state(folder)
    entries = {name: dict(entry) for name, entry in state.optimizer_scalars.items()}
    try:
        for path, tensor in load_file(folder / OPTIMIZER_FILE).items():
            name, _, field = path.rpartition("/")
            entries.setdefault(name, {})[field] = tensor
        adapter, average = _lora(folder / ADAPTER_FILE), None
        if (folder / TRAINED_FILE).is_file():
            adapter, average = _lora(folder / TRAINED_FILE), adapter
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"--resume: {folder}: cannot be read: {error}") from error
    optimizer = {"state": entries, "param_groups": state.param_groups}
    return Checkpoint(folder, state.position, adapter, optimizer, state.scaler, state.skipped_steps, average)


def _lora(file: Path) -> dict[str, Tensor]:
    return {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
