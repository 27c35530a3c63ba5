"""Reads and checks a checkpoint's state.json: the position in the run, and the optimizer's scalars."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.trainer.adapters.saved import ADAPTER_FILE
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.recipe.batch_sizes import BatchSize
from halfbyte.trainer.run_folder.checkpoint_folders import STATE_FILE, step_of
from halfbyte.trainer.wording import printable


@dataclass(frozen=True)
class Position:
    """The progress of a run, in units that do not depend on the number of processes."""

    step: int  # optimizer steps
    micro_batches: int  # micro-batches; all processes together take one
    global_batch: BatchSize  # samples in one micro-batch, over all processes

    @property
    def accumulation(self) -> int:
        """Micro-batches in one optimizer step."""
        return self.micro_batches // self.step


@dataclass(frozen=True)
class SavedState:
    """The contents of state.json."""

    position: Position
    optimizer_scalars: Mapping[str, Mapping[str, Any]]  # parameter -> field -> number
    param_groups: list[dict[str, Any]]
    scaler: dict[str, Any]
    skipped_steps: dict[str, int]  # counts of the steps that were left out; empty if the run takes every step


def read_state(folder: Path) -> SavedState:
    """Reads the state of a checkpoint whose checksums match.

    Raises:
        RecipeError: another version wrote it, or the folder has another checkpoint's name.
    """
    try:
        facts = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"), parse_constant=_constant)
        return _checked(facts, step_of(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise RecipeError(
            f"--resume: {folder / STATE_FILE}: {printable(what)}. Another version of halfbyte wrote the checkpoint:"
            f" resume with that version, or start a new run from its weights: lora.init_from={folder / ADAPTER_FILE}"
            " output.dir=runs/other"
        ) from error


def _checked(facts: Any, step: int) -> SavedState:
    counts = dict(facts["position"])
    batch = _batch(counts.pop("global_batch"))
    position = Position(**{name: _count(name, value) for name, value in counts.items()}, global_batch=batch)
    if position.step != step:
        raise ValueError(f"the state is that of step {position.step}")
    batches = [batch] if isinstance(batch, int) else batch.values()
    if 0 in (position.step, *batches) or not batches or position.micro_batches % position.step:
        raise ValueError(f"the position is {facts['position']}")
    scalars, groups, scaler = facts["optimizer_scalars"], facts["param_groups"], facts["scaler"]
    _require("optimizer_scalars", scalars, dict)
    for name, entry in scalars.items():
        _require(f"optimizer_scalars: {name}", entry, dict)
    _require("param_groups", groups, list)
    for group in groups:
        _require("param_groups", group, dict)
        _require("param_groups: params", group["params"], list)
        for name in group["params"]:
            _require("param_groups: params", name, str)
    _require("scaler", scaler, dict)
    left_out = facts.get("left_out", {})
    _require("left_out", left_out, dict)
    skipped_steps = {name: _count(f"left_out: {name}", value) for name, value in left_out.items()}
    return SavedState(position, scalars, groups, scaler, skipped_steps)


def _batch(value: Any) -> BatchSize:
    """Reads the samples of a micro-batch, which may be given by resolution."""
    if not isinstance(value, dict):
        return _count("global_batch", value)
    return {int(resolution): _count("global_batch", samples) for resolution, samples in value.items()}


def _count(name: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {value!r}")
    return value


def _require(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {str(value)[:80]!r}")


def _constant(text: str) -> float:
    """Reads Infinity, which is a setting of some optimizers. NaN is never right, and would spread to every weight."""
    if text == "NaN":
        raise ValueError("it has a value that is NaN")
    return float(text)
