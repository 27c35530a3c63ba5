"""Measures the encoders by batch size and precision, and whether an entry depends on its batch.

    python -m scripts.bench.data.batches /data/encode --px 1024 --json batches.json
    python -m scripts.bench.data.batches /tmp/encode --px 64 --size toy --batches 1,2

Takes the encoders of `encode` from the folder, or writes them. For each size of batches it gives milliseconds for an
image and a caption; whether a row is bitwise the same next to other rows and at other places of the batch; and how far
it is from the row that is encoded alone (relative RMS). The VAE in bfloat16 is compared with the VAE in float32, whose
convolutions use TF32 on CUDA.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.trainer.families.embedding import Encoders
from halfbyte.trainer.families.encoders import load_encoders
from scripts.bench.data.synthetic import write_encoders

Encode = Callable[[list[int]], Tensor]
"""Encodes a batch of items, given by their numbers."""


def images(encoders: Encoders, px: int) -> Encode:
    """Returns a function that encodes random images of px x px pixels."""

    def encode(numbers: list[int]) -> Tensor:
        drawn = [_image(number, px) for number in numbers]
        return encoders.encode_images(torch.stack(drawn).to(encoders.device)).mean

    return encode


def _image(number: int, px: int) -> Tensor:
    draws = torch.Generator().manual_seed(number)
    coarse = torch.rand(1, 3, 16, 16, generator=draws) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (px, px), mode="bicubic")[0].clamp(-1, 1)


def texts(encoders: Encoders) -> Encode:
    """Returns a function that encodes captions."""
    return lambda numbers: (
        encoders.encode_texts([f"a photo of {n} dogs and {n * n} cats" for n in numbers]).prompt_embeds
    )


def measure(encode: Encode, size: int, repeats: int, alone: Tensor) -> dict[str, Any]:
    """Returns milliseconds for an item in batches of `size`, and how its result depends on the batch.

    alone: the result for item 0 in a batch of one.
    """
    first = encode(list(range(size)))
    others = encode([0, *range(100, 99 + size)])
    last = encode([*range(100, 99 + size), 0])
    first[0].cpu()  # waits for the device
    began = time.perf_counter()
    for _ in range(repeats):
        found = encode(list(range(size)))
    found[0].cpu()
    seconds = time.perf_counter() - began
    return {
        "batch": size,
        "ms": 1000 * seconds / (repeats * size),
        "same next to others": torch.equal(first[0], others[0]),
        "same at the last place": torch.equal(others[0], last[-1]),
        "same in a second run": torch.equal(first, encode(list(range(size)))),
        "distance from alone": distance(first[0], alone[0]),
    }


def distance(found: Tensor, expected: Tensor) -> float:
    """Returns the relative RMS difference."""
    return ((found - expected).float().norm() / expected.float().norm()).item()


def main() -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="flux")
    parser.add_argument("--size", default="full")
    parser.add_argument("--px", type=int, default=1024)
    parser.add_argument("--batches", default="1,2,4,8")
    parser.add_argument("--quant", default="none,int8", help="of T5, separated by commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    sizes = [int(size) for size in arguments.batches.split(",")]
    folder = arguments.work / f"{arguments.model}-{arguments.size}"
    folder.mkdir(parents=True, exist_ok=True)
    family = write_encoders(folder, arguments.model, arguments.size, device)
    results: list[dict[str, Any]] = []

    def show(what: str, encode: Encode) -> Tensor:
        alone = encode([0])
        for size in sizes:
            found = {"what": what, **measure(encode, size, arguments.repeats, alone)}
            results.append(found)
            print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
        return alone

    def load(quant: str, dtype: torch.dtype) -> Encoders:
        memo = arguments.work / "digests"
        how: dict[str, Any] = {"t5_quant": quant, "vae_dtype": dtype, "memo": memo, "dtype": torch.bfloat16}
        return load_encoders(family, device=device, **how)

    found = [
        show(f"VAE {dtype}", images(load("none", dtype), arguments.px))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    print(f"the latents of bfloat16 differ from those of float32 by {distance(found[1], found[0]):.4f}")
    for quant in arguments.quant.split(","):
        show(f"T5 {quant}", texts(load(quant, torch.float32)))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
