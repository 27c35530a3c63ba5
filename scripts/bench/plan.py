"""Compares the memory peaks that the plan predicts with measured ones, over a grid of settings at full size.

    python -m scripts.bench.plan --measure plan.json      # on a machine with a GPU
    python -m scripts.bench.plan plan.json                # anywhere: the table with the errors

Weights are random in the real shapes. All settings of a family share one model, and settings with streamed
blocks share another. Each setting takes two optimizer steps in Lightning's order (forward, gradients freed,
backward, clipping, optimizer). The measured value is `torch.cuda.max_memory_allocated` over the second step.
Where halfbyte is not installed, see scripts/bench/train.py.
"""

import argparse
import gc
import json
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import nn

from halfbyte.trainer.adapters.lora import trained_parameters
from halfbyte.trainer.data.batches import Batch
from halfbyte.trainer.denoiser.load import add_adapters
from halfbyte.trainer.denoiser.settings import block_names, block_settings
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.offload.block_stream import BlockStream, keep_on_host, packed_blocks
from halfbyte.trainer.families.offload.copies import copies_to
from halfbyte.trainer.plan.planner import Planner
from halfbyte.trainer.plan.published_configs import PUBLISHED
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.training.module import training_module
from scripts.bench.models import family_of, random_denoiser

_RECIPES = Path(__file__).parents[2] / "recipes"
_NAMES = {"flux": "flux_lora", "sd35_large": "sd35_large_lora", "sd35_medium": "sd3_lora"}
_GIB = 2**30
_STREAMED = ("train.stream_blocks=true",)


class Setting(NamedTuple):
    """One row of the grid."""

    model: str
    px: int
    batch: int
    rank: int
    checkpointing: str
    optimizer: str = "adamw"
    attention: str = "flash"
    extra: tuple[str, ...] = ()

    def recipe(self) -> Recipe:
        """Returns the model's recipe with this row's settings."""
        overrides = [
            f"data.resolution={self.px}",
            f"train.batch_size={self.batch}",
            f"lora.rank={self.rank}",
            f"train.gradient_checkpointing={self.checkpointing}",
            "train.cuda_graphs=false",
            f"optimizer={{name: {self.optimizer}}}",
            *self.extra,
        ]
        return load_recipe(_RECIPES / f"{_NAMES[self.model]}.yaml", overrides)


GRID = (
    Setting("flux", 1024, 1, 16, "full"),
    Setting("flux", 1024, 1, 16, "selective"),
    Setting("flux", 1024, 1, 16, "none"),
    Setting("flux", 512, 1, 16, "full"),
    Setting("flux", 1024, 1, 16, "full", "adamw_8bit", "cudnn"),
    Setting("flux", 1024, 1, 16, "offload", "adamw_8bit"),
    Setting("flux", 768, 2, 16, "selective"),
    Setting("flux", 1024, 1, 16, "full", "adamw", "flash", ("train.fused_blocks=false",)),
    Setting("flux", 512, 1, 16, "full", "adafactor"),
    Setting("flux", 512, 1, 16, "none", "prodigy"),
    Setting("flux", 512, 1, 16, "full", "schedule_free_adamw", "flash", ("train.grad_accumulation=2",)),
    Setting("flux", 1024, 1, 64, "full"),
    Setting("flux", 512, 1, 64, "full", "adamw_8bit"),
    Setting("flux", 1024, 1, 16, "full", "adamw", "flash", _STREAMED),
    Setting("flux", 1024, 1, 16, "offload", "adamw_8bit", "flash", _STREAMED),
    Setting("flux", 1024, 1, 32, "full", "adamw_8bit", "flash", _STREAMED),
    Setting("sd35_large", 1024, 1, 16, "full"),
    Setting("sd35_large", 1024, 1, 16, "none"),
    Setting("sd35_large", 768, 2, 16, "selective", "adamw_8bit"),
    Setting("sd35_large", 1024, 1, 32, "selective", "adamw_8bit", "flash", _STREAMED),
    Setting("sd35_medium", 1024, 1, 16, "full"),
    Setting("sd35_medium", 1024, 2, 16, "none"),
    Setting("sd35_medium", 512, 2, 64, "full"),
)


def measured(setting: Setting, family: Family, denoiser: nn.Module) -> dict[str, float]:
    """Returns GiB allocated before the first step, after it (with the optimizer's state), and at the second's peak."""
    recipe = setting.recipe()
    family.fuse_blocks(denoiser, block_settings(recipe, setting.attention))
    denoiser.train()
    module = training_module(recipe, family, denoiser, torch.bfloat16)
    parameters = trained_parameters(denoiser)
    found = {"before": torch.cuda.memory_allocated() / _GIB}
    optimizer = recipe.optimizer.build(list(parameters.items()))
    config, side, size = family.denoiser_config, setting.px // family.vae_scale, setting.batch
    for number in range(2):
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for micro in range(recipe.train.grad_accumulation):
            batch = Batch(
                tuple(range(size)),
                torch.zeros(size, 16, side, side),
                torch.ones(size, 16, side, side),
                torch.ones(size, family.text_tokens, config["joint_attention_dim"], dtype=torch.bfloat16),
                torch.ones(size, config["pooled_projection_dim"], dtype=torch.bfloat16),
            ).to("cuda")
            with torch.autocast("cuda", torch.bfloat16):
                loss = module.loss(batch)
            if micro == 0:
                optimizer.zero_grad()
            loss.backward()
        found["backward"] = torch.cuda.max_memory_allocated() / _GIB
        nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        torch.cuda.synchronize()
        found["seconds"] = time.perf_counter() - began
        found["peak"] = torch.cuda.max_memory_allocated() / _GIB
        if number == 0:
            found["with_state"] = torch.cuda.memory_allocated() / _GIB
    optimizer.zero_grad()
    return found


def measure(models: list[str]) -> Iterator[dict[str, Any]]:
    """Measures each setting; builds every model once, and again for settings with streamed blocks."""
    for model in models:
        for streamed in (False, True):
            settings = [
                setting
                for setting in GRID
                if setting.model == model and (setting.extra == _STREAMED) == streamed
            ]
            yield from _measure(model, settings, streamed)
            gc.collect()
            torch.cuda.empty_cache()


def _measure(model: str, settings: list[Setting], streamed: bool) -> Iterator[dict[str, Any]]:
    if not settings:
        return
    device = torch.device("cuda")
    family = family_of(model)
    names = block_names(family)
    place = keep_on_host(names) if streamed else None
    denoiser: Any = random_denoiser(model, family, "ours", device, place)
    if streamed:
        BlockStream(packed_blocks(denoiser, names), copies_to(device))
    rank = None
    for setting in settings:
        if setting.rank != rank:
            if rank is not None:
                denoiser.delete_adapters("default")
            add_adapters(setting.recipe(), family, denoiser)
            denoiser.to(device)
            rank = setting.rank
        gc.collect()
        torch.cuda.empty_cache()
        try:
            yield setting._asdict() | measured(setting, family, denoiser)
        except torch.OutOfMemoryError as error:
            print(f"{setting}: {error}", flush=True)


def compare(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Prints a line for each measured setting: the prediction and its error."""
    planners: dict[str, Planner] = {}
    errors = []
    for row in rows:
        if "vae" in row:
            continue
        setting = Setting(**{name: row[name] for name in Setting._fields})
        recipe = setting.recipe()
        if setting.model not in planners:
            planners[setting.model] = Planner(recipe, family_of(setting.model))
        planner = planners[setting.model]
        assert planner.size(recipe) == (setting.px, setting.px), "the recipe's images are not square"
        predicted = planner.training_bytes(recipe) / _GIB
        errors.append(predicted / row["peak"] - 1)
        options = " ".join((setting.optimizer, setting.attention, *setting.extra))
        yield (
            f"{setting.model:11} {setting.px:4} px batch {setting.batch} rank {setting.rank:2}"
            f" {setting.checkpointing:9} {row['peak']:7.2f} {predicted:7.2f} {100 * errors[-1]:+5.1f} %  {options}"
        )
    worst = max(errors, key=abs)
    yield f"{len(errors)} settings, largest error {100 * worst:+.1f} %"


@torch.no_grad()
def measure_vae(px: int) -> Iterator[dict[str, Any]]:
    """Measures encoding in fp32 and decoding in bf16, as in runs."""
    for part, dtype in (("encode", torch.float32), ("decode", torch.bfloat16)):
        vae: Any = AutoencoderKL.from_config(PUBLISHED["black-forest-labs/FLUX.1-dev"].vae).to("cuda", dtype)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        if part == "encode":
            vae.encode(torch.zeros(1, 3, px, px, device="cuda"))
        else:
            vae.decode(torch.zeros(1, 16, px // 8, px // 8, device="cuda", dtype=dtype))
        peak = torch.cuda.max_memory_allocated()
        yield {"vae": part, "px": px, "before": before / _GIB, "peak": peak / _GIB}
        del vae


def main() -> None:
    """Measures, or compares measurements with the plan."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="file with one JSON object per line and setting")
    parser.add_argument(
        "--measure", action="store_true", help="measure on this machine and append to the file"
    )
    parser.add_argument("--models", default=",".join(_NAMES))
    arguments = parser.parse_args()
    if arguments.measure:
        for row in chain(measure(arguments.models.split(",")), measure_vae(1024)):
            line = json.dumps(row)
            print(line, flush=True)
            with arguments.file.open("a") as file:
                file.write(line + "\n")
        return
    print(f"{'':39}    GiB: measured, predicted")
    for line in compare([json.loads(line) for line in arguments.file.read_text().splitlines()]):
        print(line, flush=True)


if __name__ == "__main__":
    main()
