"""Makes many images with captions, and a pipeline with full-size random encoders, for the benches of data."""

import random
from argparse import ArgumentParser
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.pretrained.pipeline import ModelSource
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.recipe.recipe import Recipe
from scripts.bench.make_checkpoint import MODELS, SHARD_BYTES, empty_pipeline, make_checkpoint, parts_of

_DRAWN = 64  # different images; the others are copies with another digest
_SHAPES = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9))
_WORDS = "a the old photo dog house river cat red green blue window street mountain light morning with under over boat"


def add_options(parser: ArgumentParser) -> None:
    """Adds the options that the benches share."""
    parser.add_argument(
        "work", type=Path, help="a folder for images, encoders and caches; what it has is kept"
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--px", type=int, default=1024, help="data.resolution")
    parser.add_argument("--megapixels", type=float, default=2.0, help="of the image files")
    parser.add_argument("--model", choices=MODELS, default="flux")
    parser.add_argument("--size", choices=SHARD_BYTES, default="full", help="of the encoders")
    parser.add_argument("--set", action="append", default=[], help="a setting of the recipe; may be repeated")


def write_images(folder: Path, count: int, megapixels: float) -> None:
    """Writes JPEG files with captions, up to `count`. Each has its own digest and is decoded as a photograph is."""
    folder.mkdir(parents=True, exist_ok=True)
    present = len(list(folder.glob("*.jpg")))
    drawn = [_jpeg(number, megapixels) for number in range(min(_DRAWN, count))] if present < count else []
    for number in range(present, count):
        draws = random.Random(number)
        name = folder / f"{number:07d}"
        # Decoders ignore what follows the end of the image.
        name.with_suffix(".jpg").write_bytes(drawn[number % len(drawn)] + number.to_bytes(8, "little"))
        words = draws.choices(_WORDS.split(), k=draws.randrange(15, 80))
        name.with_suffix(".txt").write_text(" ".join(words))


def _jpeg(number: int, megapixels: float) -> bytes:
    """Returns a JPEG file of blurred noise and grain, which has as many bytes as a photograph: 1 to 2 bits a pixel."""
    across, down = _SHAPES[number % len(_SHAPES)]
    unit = (megapixels * 1e6 / (across * down)) ** 0.5
    size = round(across * unit), round(down * unit)
    draws = np.random.default_rng(number)
    coarse = Image.fromarray(draws.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    grain = draws.normal(0, 6, (size[1], size[0], 1))
    pixels = np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write_encoders(folder: Path, model: str, size: str, device: torch.device) -> Family:
    """Writes the VAE and the text encoders unless they are there; of the transformer only its configuration."""
    done = folder / "complete"
    if not done.exists():
        parts = [part for part in parts_of(model) if part != "transformer"]
        make_checkpoint(folder, model, size, device, parts)
        empty_pipeline(model, size).transformer.save_config(folder / "transformer")
        done.touch()
    return FAMILIES[_family_of(model)](ModelSource(model, folder, None), None)


def recipe_of(
    work: Path, pictures: Path, encoders: Path, *, model: str, px: int, overrides: list[str]
) -> Recipe:
    """Returns a recipe for these images and encoders, with a cache in `work`."""
    file = work / "recipe.yaml"
    file.write_text(
        f"model: {{family: {_family_of(model)}, path: {encoders.resolve()}}}\n"
        f"data: {{path: {pictures.resolve()}, resolution: {px}, cache_dir: {(work / 'cache').resolve()}}}\n"
        f"output: {{dir: {(work / 'run').resolve()}}}\n"
    )
    return load_recipe(file, overrides)


def _family_of(model: str) -> str:
    return "flux" if model == "flux" else "sd3"
