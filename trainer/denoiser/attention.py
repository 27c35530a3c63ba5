"""Chooses a run's attention backend: the fastest one whose output and gradients passed a check.

The check runs in a separate process (`attention_probe`), because a faulty backend can crash it.
"""

import json
import logging
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.kernels.attention.ops import FLASH4_INSTALL, FLASH4_PACKAGE, default_backend, flash4_version
from halfbyte.quant.files.atomic import write_file
from halfbyte.trainer.denoiser.attention_probe import TOLERANCE, backends_here
from halfbyte.trainer.errors import RecipeError

log = logging.getLogger(__name__)

_PROBE_SECONDS = 180  # after this, a process that hangs on the device is killed


@dataclass(frozen=True)
class AttentionShape:
    """The facts that decide which backend is fastest, and whether it computes correctly."""

    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True)
class AttentionChoice:
    """A run's backend, one of `halfbyte.kernels.attention.ops`, and the reason for it in words."""

    backend: str
    reason: str


def choose_attention(
    setting: str, shape: AttentionShape, device: torch.device, cache: Path
) -> AttentionChoice:
    """Returns the backend for `train.attention`.

    Probes the backends once for each device, software and shape; stores the results in the folder `cache`.

    Raises:
        RecipeError: the recipe names a backend that does not pass the check here.
    """
    if device.type != "cuda":
        if setting not in ("auto", "deterministic", "cpu"):
            raise RecipeError(
                f"train.attention: got {setting}, which needs a CUDA device, but this run is on the"
                f" {device.type}; expected auto, deterministic or cpu"
            )
        return AttentionChoice(default_backend(device, shape.dtype), "torch's kernel for this device")
    if setting == "deterministic":
        kernel = default_backend(device, shape.dtype)
        return AttentionChoice(setting, f"{kernel}, its backward summed in a fixed order")
    if setting == "flash4" and flash4_version() is None:
        raise RecipeError(
            f"train.attention: got flash4, but the package {FLASH4_PACKAGE} is not installed; run"
            f" {FLASH4_INSTALL}, or set auto"
        )
    results = _probe_results(shape, device, cache)
    right = {  # backend -> seconds, of those that passed the check
        result["backend"]: result["seconds"]
        for result in results
        if result.get("error", math.inf) < TOLERANCE
    }
    if setting != "auto":
        if setting not in right:
            raise RecipeError(
                f"train.attention: got {setting}, which failed the check at this run's shapes on this device"
                f" ({_failure(results, setting)}); expected auto or one that passed:"
                f" {', '.join(right) or 'none'}"
            )
        return AttentionChoice(setting, f"{1e3 * right[setting]:.2f} ms, set by the recipe")
    if not right:
        backend = default_backend(device, shape.dtype)
        log.warning(
            "no attention backend passed the accuracy check; using %s, which needs no check",
            backend,
        )
        return AttentionChoice(backend, "no backend passed the check")
    fastest = min(right, key=lambda name: right[name])
    others = [
        f"{name} {1e3 * right[name]:.2f}" if name in right else f"{name} {_failure(results, name)}"
        for name in backends_here()
        if name != fastest
    ]
    return AttentionChoice(
        fastest, f"{1e3 * right[fastest]:.2f} ms forward and backward, probed; {', '.join(others)}"
    )


def _failure(results: Sequence[dict[str, Any]], backend: str) -> str:
    """Describes why a backend failed the check."""
    for result in results:
        if result["backend"] == backend:
            if "refused" in result:
                return f"refused: {result['refused']}"
            return f"has a relative error of {result['error']:.2g} in its output or gradients"
    return "crashed the probe"


def _probe_results(shape: AttentionShape, device: torch.device, cache: Path) -> list[dict[str, Any]]:
    """Returns the probe's results from the cache, or runs the probe and stores them."""
    key = ", ".join(
        (
            torch.cuda.get_device_name(device),
            f"torch {torch.__version__}",
            f"cuDNN {torch.backends.cudnn.version()}",
            *([] if flash4_version() is None else [f"{FLASH4_PACKAGE} {flash4_version()}"]),
            str(shape.dtype),
            f"{shape.tokens} x {shape.heads} x {shape.head_dim}",
        )
    )
    file = cache / "attention.json"
    known = _read(file)
    if key not in known:
        log.info("checking attention backends at %d tokens, once for this device", shape.tokens)
        known[key] = run_probe(shape, device)
        # If no backend could run, another process had the device or it failed. Try again at the next start.
        if any("error" in result for result in known[key]):
            _write(file, key, known[key])
    return known[key]


def run_probe(shape: AttentionShape, device: torch.device) -> list[dict[str, Any]]:
    """Probes the backends in a separate process; returns what it printed, even if it then crashed."""
    command = [
        *(sys.executable, "-m", "halfbyte.trainer.denoiser.attention_probe"),
        *("--device", str(device), "--dtype", str(shape.dtype).removeprefix("torch.")),
        *("--tokens", str(shape.tokens), "--heads", str(shape.heads), "--head-dim", str(shape.head_dim)),
    ]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False)
        printed = ended.stdout
    except subprocess.TimeoutExpired as hung:
        printed = hung.stdout.decode() if isinstance(hung.stdout, bytes) else hung.stdout or ""
    results = []
    for line in printed.splitlines():
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # a library's message, or a line cut off by the crash
    return results


def _read(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(file: Path, key: str, results: list[dict[str, Any]]) -> None:
    """Adds an entry. The file is replaced atomically, because several runs may write it at once."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(_read(file) | {key: results}, indent=1))
    except OSError as error:
        log.warning("cannot save the results of the attention check in %s: %s", file, error.strerror)
