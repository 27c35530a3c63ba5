"""Layers that quant.skip and quant.exact name and the model has not: told alike by `halfbyte plan` and by a run."""

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
EXPECTED = {
    "skip": (
        "got 'nothing', which matches no linear layer of FluxTransformer2DModel; expected names or paths of layers, or"
        " of modules that hold some: time_text_embed, context_embedder, x_embedder, transformer_blocks,"
        " single_transformer_blocks, norm_out, proj_out or what is inside of them"
    ),
    "exact": (
        "got 'nothing', which is no linear layer of FluxTransformer2DModel; expected whole paths, of "
        + OUTSIDE
    ),
}


@pytest.mark.parametrize("field", EXPECTED)
@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_name_of_no_layer_is_told_with_its_setting_and_line(
    mini_flux: Path, tmp_path: Path, command: str, field: str
) -> None:
    recipe = write_recipe(tmp_path, mini_flux)
    override = f"quant.{field}=[nothing]"
    result = CliRunner().invoke(app, [command, str(recipe), override])
    assert (result.exit_code, result.stderr) == (2, f"error: command line: {override}: {EXPECTED[field]}\n")
    recipe.write_text(recipe.read_text().replace("quant: {", f"quant: {{{field}: [nothing], "))
    result = CliRunner().invoke(app, [command, str(recipe)])
    assert (result.exit_code, result.stderr) == (2, f"error: {recipe}:3: quant.{field}: {EXPECTED[field]}\n")


def test_a_list_that_a_packed_transformer_brings_along_may_name_what_it_has_not(
    mini_flux: Path, tmp_path: Path
) -> None:
    """One list for several models is common in configurations of bitsandbytes."""
    recipe = write_recipe(tmp_path, mini_flux)
    alone = read_world({"ACCELERATE_USE_CPU": "true"})
    made = quantize(load_recipe(recipe), tmp_path / "made", 0, alone, Console(quiet=True)).folder
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head"]
    (made / "config.json").write_text(json.dumps(config))
    planned = CliRunner().invoke(app, ["plan", str(recipe), f"model.transformer={made}"])
    assert planned.exit_code == 0, planned.output
    run_here(recipe, f"model.transformer={made}", "sample.prompts=[]", "output.export_base=false")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("quant.skip=[nothing]", "quant.skip"),
        ("quant.exact=[nothing]", "quant.exact"),
        ("lora.targets=[to_q, nothing]", "lora.targets"),
        ("lora.rank_pattern={nothing: 4}", "lora.rank_pattern"),
    ],
)
def test_a_run_tells_it_before_it_encodes_or_keeps_anything(
    mini_flux: Path, tmp_path: Path, override: str, told: str
) -> None:
    recipe = write_recipe(tmp_path, mini_flux)
    kept = {file for file in tmp_path.rglob("*") if file.is_file()}
    result = CliRunner().invoke(app, ["train", str(recipe), override])
    assert (result.exit_code, told in result.stderr) == (2, True)
    assert "encoding" not in result.output
    assert {file for file in tmp_path.rglob("*") if file.is_file()} == kept
