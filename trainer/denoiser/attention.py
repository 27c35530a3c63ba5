"""Which attention a run computes with: the fastest of those that gave the right gradients in a process of their own."""

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

_PROBE_SECONDS = 180  # a process that hangs on the device is given up on


@dataclass(frozen=True)
class AttentionShape:
    """What decides which backend is fastest, and whether it is right."""

    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True)
class AttentionChoice:
    """The backend of `halfbyte.kernels.attention.ops` that a run takes, and what is said of it."""

    backend: str
    reason: str


def choose_attention(
    setting: str, shape: AttentionShape, device: torch.device, cache: Path
) -> AttentionChoice:
    """The backend for `train.attention`; probed once for each device, software and shape, and remembered in `cache`.

    Raises RecipeError where the recipe names a backend that is not right here.
    """
    if device.type != "cuda":
        if setting not in ("auto", "deterministic", "cpu"):
            raise RecipeError(
                f"train.attention: {setting} needs a CUDA device, and this run is on the {device.type}; use auto"
            )
        return AttentionChoice(default_backend(device, shape.dtype), "torch's own for this device")
    if setting == "deterministic":
        kernel = default_backend(device, shape.dtype)
        return AttentionChoice(setting, f"{kernel}, its backward summed in a fixed order")
    if setting == "flash4" and flash4_version() is None:
        raise RecipeError(
            f"train.attention: flash4 needs the package {FLASH4_PACKAGE} ({FLASH4_INSTALL}); or write auto"
        )
    results = _remembered(shape, device, cache)
    right = {
        result["backend"]: result["seconds"]
        for result in results
        if result.get("error", math.inf) < TOLERANCE
    }
    if setting != "auto":
        if setting not in right:
            raise RecipeError(
                f"train.attention: {setting} is not right at this run's shapes on this device"
                f" ({_told(results, setting)}); accepted here: {', '.join(right) or 'none'}; or auto"
            )
        return AttentionChoice(setting, f"{1e3 * right[setting]:.2f} ms, as the recipe says")
    if not right:
        backend = default_backend(device, shape.dtype)
        log.warning("the attention probe found no backend right; taking %s, which needs no probe", backend)
        return AttentionChoice(backend, "the probe told nothing")
    fastest = min(right, key=lambda name: right[name])
    others = [
        f"{name} {1e3 * right[name]:.2f}" if name in right else f"{name} {_told(results, name)}"
        for name in backends_here()
        if name != fastest
    ]
    return AttentionChoice(
        fastest, f"{1e3 * right[fastest]:.2f} ms forward and backward, probed; {', '.join(others)}"
    )


def _told(results: Sequence[dict[str, Any]], backend: str) -> str:
    for result in results:
        if result["backend"] == backend:
            if "refused" in result:
                return f"refused: {result['refused']}"
            return f"its gradients are off by {result['error']:.2g} of their size"
    return "its process died"


def _remembered(shape: AttentionShape, device: torch.device, cache: Path) -> list[dict[str, Any]]:
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
        log.info("trying attention backends at %d tokens, once for this device", shape.tokens)
        known[key] = run_probe(shape, device)
        # Where nothing is right the device was taken or broken, which need not be so at the next start.
        if any("error" in result for result in known[key]):
            _write(file, key, known[key])
    return known[key]


def run_probe(shape: AttentionShape, device: torch.device) -> list[dict[str, Any]]:
    """What a process of its own printed before it ended, however it ended."""
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
            continue  # a library's notice, or the half of a line
    return results


def _read(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(file: Path, key: str, results: list[dict[str, Any]]) -> None:
    """Adds an entry; several runs may do so at once, so the file is replaced whole."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(_read(file) | {key: results}, indent=1))
    except OSError as error:
        log.warning("cannot remember the attention probe in %s: %s", file, error.strerror)
