"""Measures how much of a training step is spent waiting for data from a warm cache.

    python -m scripts.bench.data.load /data/encode --images 2000 --px 512 --step 0.2 --batch 1,4
    python -m scripts.bench.data.load /tmp/encode --images 40 --px 64 --megapixels 0.1 --size toy --step 0.02

Takes the folder of `encode`, and fills its cache if it is not full at this size. A step is a wait on the device of
`--step` seconds. `ahead` reads the next batches in a thread, as runs do; `plain` reads each when it is wanted.
`--cold` first drops the cache's files from the page cache.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import DataLoader

from halfbyte.trainer.cli.console import quieten_libraries
from halfbyte.trainer.data.batches import collate
from halfbyte.trainer.data.prepare import Prepared, prepare
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.world import World, join, read_world
from scripts.bench.data.synthetic import add_options, recipe_of, write_encoders, write_images


def waiting(loader: DataLoader[Any], world: World, steps: int, step_seconds: float) -> dict[str, float]:
    """Returns the seconds of waiting and of everything, over `steps` steps after the first."""
    batches = iter(loader)
    next(batches).to(world.device)
    wait, began = 0.0, time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        batch = next(batches).to(world.device)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        wait += time.perf_counter() - before
        time.sleep(step_seconds)
        del batch
    return {"wait_s": wait, "seconds": time.perf_counter() - began, "steps": steps}


def measure(prepared: Prepared, recipe: Recipe, world: World, arguments: argparse.Namespace) -> list[Any]:
    """Measures both ways of reading, and prints and returns their numbers."""
    results = []
    for way in ("plain", "ahead"):
        if arguments.cold:
            _drop(recipe.data.cache_folder)
        ahead = prepared.loader(recipe, world, 0)
        loader: DataLoader[Any] = ahead
        if way == "plain":
            loader = DataLoader(
                prepared.training_set,
                batch_sampler=ahead.batch_sampler,
                collate_fn=collate,
                pin_memory=world.device.type == "cuda",
            )
        found = waiting(loader, world, arguments.steps, arguments.step)
        ahead.close()
        share, waited = found["wait_s"] / found["seconds"], 1000 * found["wait_s"] / arguments.steps
        results.append(
            {"way": way, "batch": recipe.train.batch_size, "px": arguments.px, "share": share, **found}
        )
        print(
            f"{arguments.px} px, batch {recipe.train.batch_size}, {way}: {waited:.2f} ms of"
            f" waiting a step, {share:.2%} of a step of {1000 * arguments.step:.0f} ms",
            flush=True,
        )
    return results


def _drop(folder: Path) -> None:
    for file in folder.rglob("*.shard"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--step", type=float, default=0.2, help="seconds that the device computes in a step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", default="1", help="batch sizes, separated by commas")
    parser.add_argument("--cold", action="store_true", help="drop the cache from the page cache first")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    quieten_libraries()
    world = read_world()
    join(world)
    arguments.work.mkdir(parents=True, exist_ok=True)
    pictures = arguments.work / f"pictures-{arguments.megapixels:g}"
    write_images(pictures, arguments.images, arguments.megapixels)
    encoders = arguments.work / f"{arguments.model}-{arguments.size}"
    family = write_encoders(encoders, arguments.model, arguments.size, world.device)
    results = []
    for batch in arguments.batch.split(","):
        settings = [*arguments.set, f"train.batch_size={batch}", f"train.steps={arguments.steps + 8}"]
        recipe = recipe_of(
            arguments.work, pictures, encoders, model=arguments.model, px=arguments.px, overrides=settings
        )
        prepared = prepare(recipe, family, world, Console(soft_wrap=True))
        results += measure(prepared, recipe, world, arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
