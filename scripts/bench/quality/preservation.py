"""Measures what `objective.preserve` keeps: how far images of untrained captions move from those of the base.

    python -m scripts.bench.quality.preservation --weights 0,1,3 --seeds 0,1,2

The miniature FLUX learns blueprints, here without the plain images that its own data set holds. Afterwards it generates
images of plain captions ("a picture of a lion"), whose images should not change, and of blueprints, which should. The
distance is the mean absolute difference from the base's image, from 0 to 1. The class caption is "a picture of an owl",
which is none of them. Weight 0 is a run without preservation.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy
from PIL import Image
from rich.console import Console

from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.run import run
from halfbyte.trainer.runtime.world import read_world
from halfbyte.trainer.training.metrics import read_validation

_RECIPES = Path(__file__).resolve().parents[3] / "recipes"
_PLAIN = ("lion", "penguin", "lemon", "bus", "tent", "sunflower", "mushroom", "locomotive")
_STYLED = ("rocket", "cat", "house", "key")
PROMPTS = [f"a picture of a {name}" for name in _PLAIN] + [f"a blueprint of a {name}" for name in _STYLED]
_CLASS = "a picture of an owl"


@dataclass(frozen=True)
class Moved:
    """The result of one run."""

    weight: float
    seed: int
    validation: float  # the loss on held-out blueprints at the end
    plain: float  # distance of plain images from the base's
    styled: float


def main() -> None:
    """Trains with each weight and seed, and prints a Markdown table of the means over the seeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--weights", default="0,1", help="factors of the preserved part of the loss; 0: without it"
    )
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=240)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pictures = write_styled(Path(folder) / "blueprints")
        results = [
            measure(Path(folder), pictures, float(weight), int(seed), arguments.steps)
            for weight in arguments.weights.split(",")
            for seed in arguments.seeds.split(",")
        ]
    print("\n".join(table(results)))


def write_styled(folder: Path) -> Path:
    """Copies the training images in the style of blueprints, without the plain ones, with their captions."""
    folder.mkdir()
    source = _RECIPES / "blueprints" / "train"
    rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    kept = [row for row in rows if "blueprint" in row["text"]]
    for row in kept:
        shutil.copy(source / row["file_name"], folder)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return folder


def measure(folder: Path, pictures: Path, weight: float, seed: int, steps: int) -> Moved:
    """Trains once and compares the images of the first and of the last step."""
    output = folder / f"weight-{weight:g}-seed-{seed}"
    overrides = [
        f"data.path={pictures}",
        f"data.cache_dir={folder / 'cache'}",
        f"output.dir={output}",
        "output.self_check=false",
        f"sample.prompts={json.dumps(PROMPTS)}",
        f"train.steps={steps}",
        f"train.seed={seed}",
    ]
    if weight:
        overrides.append(f"objective.preserve={{caption: {_CLASS}, weight: {weight}}}")
    recipe = load_recipe(_RECIPES / "flux_mini.yaml", overrides)
    assert run(recipe, read_world(), console=Console(quiet=True), resume=False)
    distances = [
        _distance(*(output / "samples" / f"step-{step:06d}-{number:02d}.png" for step in (0, steps)))
        for number in range(len(PROMPTS))
    ]
    loss = read_validation(output / "validation.csv")[-1].loss
    return Moved(weight, seed, loss, fmean(distances[: len(_PLAIN)]), fmean(distances[len(_PLAIN) :]))


def _distance(*files: Path) -> float:
    one, other = (numpy.asarray(Image.open(file).convert("RGB"), dtype=numpy.float64) / 255 for file in files)
    return float(numpy.abs(one - other).mean())


def table(results: Sequence[Moved]) -> list[str]:
    """Returns a Markdown table with a row for each weight: means over the seeds."""
    lines = [
        "| weight | runs | validation loss | plain images moved | blueprints moved |",
        "| --- | --- | --- | --- | --- |",
    ]
    for weight in dict.fromkeys(result.weight for result in results):
        own = [result for result in results if result.weight == weight]
        lines.append(
            f"| {weight:g} | {len(own)} | {fmean(one.validation for one in own):.4f} |"
            f" {fmean(one.plain for one in own):.4f} | {fmean(one.styled for one in own):.4f} |"
        )
    return lines


if __name__ == "__main__":
    main()
