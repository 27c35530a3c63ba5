"""Times the start of a run with many images and an empty cache, and says where the time goes.

    python -m scripts.bench.data.encode /data/encode --images 5000 --json encode.json
    python -m scripts.bench.data.encode /tmp/encode --images 40 --px 64 --megapixels 0.1 --size toy

Images are synthetic JPEG files, the encoders have a published model's shapes and random weights. A cache takes 6.3 MB
for each image of FLUX at 1024 px. `--workers N` overrides the number of processes that decode. Images and encoders stay
in the folder for the next call; the cache is emptied first.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch


def encode(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fills a cold cache, prints a table and returns its numbers: seconds and images per second."""
    # Imported here, because worker processes import this file.
    import torch
    from rich.console import Console

    from halfbyte.trainer.cli.console import quieten_libraries
    from halfbyte.trainer.data import prepare as prepare_module
    from halfbyte.trainer.data.cache import fill
    from halfbyte.trainer.runtime.world import join, read_world
    from scripts.bench.data.synthetic import recipe_of, write_encoders, write_images

    quieten_libraries()
    world = read_world()
    join(world)
    work: Path = arguments.work
    pictures = work / f"pictures-{arguments.megapixels:g}"
    began = time.perf_counter()
    write_images(pictures, arguments.images, arguments.megapixels)
    encoders = work / f"{arguments.model}-{arguments.size}"
    family = write_encoders(encoders, arguments.model, arguments.size, world.device)
    print(f"images and encoders written in {time.perf_counter() - began:.1f} s", flush=True)
    recipe = recipe_of(
        work, pictures, encoders, model=arguments.model, px=arguments.px, overrides=arguments.set
    )
    shutil.rmtree(recipe.data.cache_folder, ignore_errors=True)
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*positional: Any, **named: Any) -> Any:
            before = time.perf_counter()
            try:
                return function(*positional, **named)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - before

        return call

    filled: list[fill.Times] = []
    if world.device.type == "cuda":
        torch.cuda.init()
    console = Console(soft_wrap=True)
    began = time.perf_counter()
    with ExitStack() as patches:
        for name, label in (("read_data", "reading images"), ("_encode", "encoding")):
            function = getattr(prepare_module, name)
            patches.enter_context(patch.object(prepare_module, name, timed(label, function)))
        patches.enter_context(
            patch.object(fill.Filling, "report", lambda filling: filled.extend(filling.times))
        )
        if arguments.workers is not None:
            patches.enter_context(
                patch.object(prepare_module, "_workers", lambda world, views: arguments.workers)
            )
        prepare_module.prepare(recipe, family, world, console)
    total = time.perf_counter() - began
    found = {
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU",
        "model": arguments.model,
        "size": arguments.size,
        "images": arguments.images,
        "px": arguments.px,
        "settings": arguments.set,
        "seconds": total,
        "images_per_second": arguments.images / total,
        "phases": seconds,
        "encoders": [vars(times) for times in filled],
        "cache_gb": sum(file.stat().st_size for file in recipe.data.cache_folder.rglob("*.shard")) / 1e9,
    }
    for line in lines(found, filled):
        print(line, flush=True)
    return found


def lines(found: dict[str, Any], filled: list[Any]) -> list[str]:
    """Returns the result as text."""
    return [
        f"{found['images']:,} images at {found['px']} px on {found['device']}: {found['seconds']:.1f} s,"
        f" {found['images_per_second']:.1f} images/s, cache {found['cache_gb']:.1f} GB",
        *(f"  {name}: {taken:.1f} s" for name, taken in found["phases"].items()),
        *(f"  {times}" for times in filled),
    ]


def main() -> None:
    """Reads the command line and measures."""
    from scripts.bench.data.synthetic import add_options

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--workers", type=int, help="processes that decode; default: as in a run")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    found = encode(arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
