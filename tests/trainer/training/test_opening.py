"""The summary that a run prints before training."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.run import run
from halfbyte.trainer.runtime.world import read_world

from runs import write_recipe


@pytest.mark.parametrize(
    ("settings", "reasons", "checkpointing"),
    [
        ((), None, ["full"]),
        (("train.gradient_checkpointing=selective",), None, ["selective"]),
        (
            ("train.gradient_checkpointing=offload", "lora.dora=true", "lora.dropout=0.1"),
            "(lora.dora: true, lora.dropout: 0.1)",
            ["full", "offload"],
        ),
        (("quant.type=int8",), "(an int8 base)", ["full"]),
        (
            ("train.gradient_checkpointing=none", "train.fused_blocks=false"),
            "(train.fused_blocks: false)",
            ["none"],
        ),
    ],
)
def test_the_checkpointing_that_really_applies_is_printed(
    mini_flux: Path, tmp_path: Path, settings: tuple[str, ...], reasons: str | None, checkpointing: list[str]
) -> None:
    """The line names the mode that applies first, and the configured mode if that has no effect."""
    console = Console(record=True, width=200)
    quick = ("train.steps=1", "sample.prompts=[]", "output.export_base=false")
    recipe = load_recipe(write_recipe(tmp_path, mini_flux), [*quick, *settings])
    assert run(recipe, read_world({"ACCELERATE_USE_CPU": "true"}), console=console, resume=False)
    (line,) = [line for line in console.export_text().splitlines() if line.startswith("blocks")]
    how, _, kept = line.partition("; checkpointing ")
    assert ("layer by layer" in how) == (reasons is not None)
    assert reasons is None or how.endswith(reasons)
    assert re.findall(r"\b(?:none|selective|full|offload)\b", kept) == checkpointing
    assert kept.startswith(checkpointing[0])
