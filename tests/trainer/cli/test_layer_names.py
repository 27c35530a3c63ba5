"""Tests unknown layer names: `halfbyte plan` and a run report the same error with its setting and line."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from halfbyte.trainer.cli.app import app
from halfbyte.trainer.quantize.run import quantize
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.runtime.world import read_world

from runs import run_here, write_recipe

OUTSIDE = (
    "time_text_embed.timestep_embedder.linear_1, time_text_embed.timestep_embedder.linear_2,"
    " time_text_embed.guidance_embedder.linear_1, time_text_embed.guidance_embedder.linear_2,"
    " time_text_embed.text_embedder.linear_1, time_text_embed.text_embedder.linear_2, context_embedder, x_embedder,"
    " norm_out.linear, proj_out"
)
# The facts that the message of each setting must contain.
EXPECTED = {
    "skip": (
        "'nothing'",
        "FluxTransformer2DModel",
        "time_text_embed, context_embedder, x_embedder, transformer_blocks, single_transformer_blocks, norm_out,"
        " proj_out",
    ),
    "exact": ("'nothing'", "FluxTransformer2DModel", OUTSIDE),
}


@pytest.mark.parametrize("field", EXPECTED)
@pytest.mark.parametrize("command", ["plan", "train"])
def test_an_unknown_layer_is_reported_with_setting_and_line(
    mini_flux: Path, tmp_path: Path, command: str, field: str
) -> None:
    def message_after(start: str, *arguments: str) -> str:
        result = CliRunner().invoke(app, [command, str(recipe), *arguments])
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert result.stderr.startswith(start)
        return result.stderr.removeprefix(start)

    recipe = write_recipe(tmp_path, mini_flux)
    override = f"quant.{field}=[nothing]"
    message = message_after(f"error: command line: {override}: ", override)
    assert all(fact in message for fact in EXPECTED[field]), message
    recipe.write_text(recipe.read_text().replace("quant: {", f"quant: {{{field}: [nothing], "))
    assert message_after(f"error: {recipe}:3: quant.{field}: ") == message


def test_the_skip_list_of_a_packed_transformer_may_name_unknown_layers(
    mini_flux: Path, tmp_path: Path
) -> None:
    """Configurations of bitsandbytes often share one list between several models."""
    recipe = write_recipe(tmp_path, mini_flux)
    world = read_world({"ACCELERATE_USE_CPU": "true"})
    packed = quantize(load_recipe(recipe), tmp_path / "packed", 0, world, Console(quiet=True)).folder
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head"]
    (packed / "config.json").write_text(json.dumps(config))
    planned = CliRunner().invoke(app, ["plan", str(recipe), f"model.transformer={packed}"])
    assert planned.exit_code == 0, planned.output
    run_here(recipe, f"model.transformer={packed}", "sample.prompts=[]", "output.export_base=false")


@pytest.mark.parametrize(
    ("override", "setting"),
    [
        ("quant.skip=[nothing]", "quant.skip"),
        ("quant.exact=[nothing]", "quant.exact"),
        ("lora.targets=[to_q, nothing]", "lora.targets"),
        ("lora.rank_pattern={nothing: 4}", "lora.rank_pattern"),
    ],
)
def test_a_run_reports_it_before_encoding_or_writing_anything(
    mini_flux: Path, tmp_path: Path, override: str, setting: str
) -> None:
    recipe = write_recipe(tmp_path, mini_flux)
    before = {file for file in tmp_path.rglob("*") if file.is_file()}
    result = CliRunner().invoke(app, ["train", str(recipe), override])
    assert (result.exit_code, setting in result.stderr) == (2, True)
    assert "encoding" not in result.output
    assert {file for file in tmp_path.rglob("*") if file.is_file()} == before
