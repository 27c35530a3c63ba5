"""What a run says of itself ahead of training."""

from pathlib import Path

import pytest
from rich.console import Console

from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.run import run
from halfbyte.trainer.runtime.world import read_world

from runs import write_recipe


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((), "each as one function; checkpointing full"),
        (("train.gradient_checkpointing=selective",), "each as one function; checkpointing selective"),
        (
            ("train.gradient_checkpointing=offload", "lora.dora=true", "lora.dropout=0.1"),
            "layer by layer (lora.dora: true, lora.dropout: 0.1); checkpointing full, which offload is layer by layer",
        ),
        (("quant.type=int8",), "layer by layer (an int8 base); checkpointing full"),
        (
            ("train.gradient_checkpointing=none", "train.fused_blocks=false"),
            "layer by layer (train.fused_blocks: false); checkpointing none",
        ),
    ],
)
def test_what_blocks_keep_is_said_as_it_is(
    mini_flux: Path, tmp_path: Path, settings: tuple[str, ...], said: str
) -> None:
    """Settings that mean less than they say, beside others, are not passed over."""
    console = Console(record=True, width=200)
    quick = ("train.steps=1", "sample.prompts=[]", "output.export_base=false")
    recipe = load_recipe(write_recipe(tmp_path, mini_flux), [*quick, *settings])
    assert run(recipe, read_world({"ACCELERATE_USE_CPU": "true"}), console=console, resume=False)
    (line,) = [line for line in console.export_text().splitlines() if line.startswith("blocks")]
    assert line.split(maxsplit=1)[1].strip() == said
