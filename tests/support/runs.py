"""A recipe that trains within seconds, and ways to run it, for the tests of whole runs."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from halfbyte.trainer.adapters.saved import ADAPTER_FILE
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.run import run
from halfbyte.trainer.runtime.world import World, read_world
from halfbyte.trainer.training.metrics import read_metrics, read_validation

PICTURES = 6


def write_pictures(folder: Path) -> Path:
    """Writes images with text captions: gradients of different colors."""
    folder.mkdir()
    for number in range(PICTURES):
        ramp = numpy.linspace(0, 255, 80)[None, :, None] * numpy.ones((72, 1, 3))
        ramp[..., number % 3] = 40 * number
        Image.fromarray(ramp.astype("uint8")).save(folder / f"picture{number}.png")
        (folder / f"picture{number}.txt").write_text(f"a gradient, number {number}")
    return folder


def write_recipe(folder: Path, model: Path, *, family: str = "flux", name: str = "run") -> Path:
    """Writes a recipe of a few steps over `folder/pictures`, which it makes; returns its path."""
    if not (folder / "pictures").exists():
        write_pictures(folder / "pictures")
    recipe = folder / f"{name}.yaml"
    recipe.write_text(
        f"""
model: {{family: {family}, path: {model}, max_sequence_length: 24}}
quant: {{type: nf4, double_quant: true, compute_dtype: float32}}
lora: {{rank: 4, alpha: 4, targets: all-linear}}
data: {{path: ./pictures, resolution: 64, cache_dir: ./cache}}
objective:
  shift: {{name: static, shift: 2.0}}
optimizer: {{name: adamw, lr: 1.0e-3}}
train: {{steps: 4, batch_size: 1, grad_accumulation: 2, seed: 5}}
sample: {{prompts: [a gradient], steps: 2, width: 64, height: 64}}
checkpoint: {{every: 2, keep: 2}}
output: {{dir: {folder / name}, self_check: false}}
"""
    )
    return recipe


def run_here(
    recipe: Path,
    *overrides: str,
    resume: bool = False,
    world: World | None = None,
    console: Console | None = None,
) -> Path:
    """Trains in this process; returns the run's folder. console: where the run reports, nowhere by default."""
    settings = load_recipe(recipe, overrides)
    assert run(
        settings,
        world or read_world({"ACCELERATE_USE_CPU": "true"}),
        console=console or Console(quiet=True),
        resume=resume,
    )
    return settings.output.dir


def environment() -> dict[str, str]:
    """Returns the environment of a separate process: one thread, no network, no launcher's variables."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "TORCHELASTIC_", "SLURM_"))
    }
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(
    *arguments: str, timeout: float = 180, environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` to its end; environ: additional environment variables."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment() | dict(environ or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def results(run: Path) -> tuple[object, ...]:
    """Returns the adapter and every number of the CSV files, apart from the speed."""
    rows = [(r.step, r.loss, r.lr, r.grad_norm, r.validation_loss) for r in read_metrics(run / "metrics.csv")]
    adapter = {name: tensor.tolist() for name, tensor in load_file(run / "adapter" / ADAPTER_FILE).items()}
    return rows, read_validation(run / "validation.csv"), adapter


def free_port() -> int:
    """Returns a port of the loopback interface that is not in use."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
