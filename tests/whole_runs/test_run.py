"""Whole runs: pinned losses, files that stock diffusers loads, and exit codes for broken recipes and data."""

import json
import shutil

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from halfbyte.quant.load.transformer import load_quantized
from halfbyte.trainer.cli.app import app, train_app
from halfbyte.trainer.export.export import ADAPTER_FILE
from halfbyte.trainer.training.metrics import read_metrics
from scripts.mini.tiny_pipelines import build_flux_pipeline

from judge import stock_bitsandbytes_on_cpu
from runs import run_here, write_recipe

STOCK = {
    "flux": (FluxPipeline, FluxTransformer2DModel),
    "sd3": (StableDiffusion3Pipeline, SD3Transformer2DModel),
}


@pytest.fixture(scope="module")
def mini_flux(tmp_path_factory):
    """The miniature with two dual and four single blocks, which the pinned losses belong to."""
    folder = tmp_path_factory.mktemp("mini") / "flux"
    build_flux_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["flux", "sd3"])
def finished(request, tmp_path_factory):
    family = request.param
    model = request.getfixturevalue(f"mini_{family}")
    folder = tmp_path_factory.mktemp(family)
    recipe = write_recipe(folder, model, family=family)
    return family, model, run_here(recipe)


def test_a_run_writes_the_files_its_summary_names(finished):
    _, _, folder = finished
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("adapter", "base", "checkpoint", "samples", "metrics"):
        assert (folder.parent / summary[name]).exists(), name
    assert [row.step for row in read_metrics(folder / "metrics.csv")] == [1, 2, 3, 4]
    assert list((folder / "tensorboard").iterdir())
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    before, after = (Image.open(folder / "samples" / f"step-00000{step}-00.png") for step in (0, 4))
    assert before.size == (64, 64)
    assert before.tobytes() != after.tobytes()
    assert (folder / "recipe.yaml").is_file()


def test_the_adapter_carries_rank_and_alpha(finished):
    _, _, folder = finished
    with safe_open(folder / "adapter" / ADAPTER_FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        assert all(name.startswith("transformer.") for name in file.keys())  # noqa: SIM118
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (4, 4)


def predict(transformer, family):
    draws = torch.Generator().manual_seed(0)
    config = transformer.config
    inputs = {
        "encoder_hidden_states": torch.randn(1, 24, config.joint_attention_dim, generator=draws),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=draws),
        "return_dict": False,
    }
    if family == "flux":
        inputs |= {
            "hidden_states": torch.randn(1, 16, config.in_channels, generator=draws),
            "timestep": torch.tensor([0.5]),
            "guidance": torch.tensor([1.0]),
            "img_ids": torch.randn(16, 3, generator=draws),
            "txt_ids": torch.zeros(24, 3),
        }
    else:
        inputs |= {
            "hidden_states": torch.randn(1, config.in_channels, 8, 8, generator=draws),
            "timestep": torch.tensor([500.0]),
        }
    with torch.no_grad():
        return transformer.train()(**inputs)[0]


def test_stock_diffusers_loads_the_export_and_agrees(finished):
    family, model, folder = finished
    pipeline_class, transformer_class = STOCK[family]
    with stock_bitsandbytes_on_cpu():
        base = transformer_class.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    bare = predict(base, family)
    pipeline = pipeline_class.from_pretrained(model, transformer=base, torch_dtype=torch.float32)
    pipeline.load_lora_weights(folder / "adapter")
    stock = predict(pipeline.transformer, family)

    ours = load_quantized(
        transformer_class, folder / "transformer", None, dtype=torch.float32, device=torch.device("cpu")
    )
    own_pipeline = pipeline_class.from_pretrained(model, transformer=ours, torch_dtype=torch.float32)
    own_pipeline.load_lora_weights(folder / "adapter")
    own = predict(own_pipeline.transformer, family)
    moved = (stock - bare).norm() / bare.norm()
    assert moved > 1e-3, "the adapter has no effect on the output"
    assert (own - stock).norm() / stock.norm() < 1e-5


def test_losses_are_the_pinned_ones(finished):
    family, _, folder = finished
    pinned = {
        "flux": [2.492477, 2.286122, 2.300242, 2.342266],
        "sd3": [3.772941, 3.270600, 3.265578, 3.050690],
    }[family]
    assert [row.loss for row in read_metrics(folder / "metrics.csv")] == pytest.approx(pinned, rel=1e-4)


def test_a_repeated_run_is_bitwise_identical(finished, tmp_path):
    family, model, folder = finished
    again = run_here(write_recipe(tmp_path, model, family=family))
    assert [r.loss for r in read_metrics(folder / "metrics.csv")] == [
        r.loss for r in read_metrics(again / "metrics.csv")
    ]
    one, other = (load_file(run / "adapter" / ADAPTER_FILE) for run in (folder, again))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def test_an_exported_base_trains_like_the_original(finished, tmp_path):
    """The exported transformer replaces the pipeline's own and must not be quantized again."""
    family, model, folder = finished
    shutil.copytree(model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "transformer")
    shutil.copytree(folder / "transformer", tmp_path / "model" / "transformer")
    again = run_here(write_recipe(tmp_path, tmp_path / "model", family=family))
    first, second = (read_metrics(f / "metrics.csv")[0].loss for f in (folder, again))
    assert second == pytest.approx(first, rel=1e-5)


def invoke(recipe, *arguments):
    return CliRunner().invoke(train_app, [str(recipe), *arguments])


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (["train.stepz=3"], 2, "train.stepz"),
        (["train.steps=many"], 2, "train.steps"),
        (["model.path=./nowhere"], 2, "nowhere"),
        (["quant.compute_dtype=float16"], 2, "float16"),
        (["lora.targets=[no_such_layer]"], 2, "no_such_layer"),
        (["model.family=sd3"], 2, "model.family"),
    ],
)
def test_mistakes_in_a_recipe_end_in_one_message(tmp_path, mini_flux, arguments, code, fragment):
    result = invoke(write_recipe(tmp_path, mini_flux), *arguments)
    assert result.exit_code == code, result.output
    assert fragment in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_is_named(tmp_path):
    result = invoke(tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert "none.yaml" in result.output


@pytest.mark.parametrize("component", ["vae", "text_encoder_2", "tokenizer", "scheduler", "transformer"])
def test_a_model_folder_that_lacks_a_component(tmp_path, mini_flux, component):
    shutil.copytree(mini_flux, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / component)
    result = invoke(write_recipe(tmp_path, tmp_path / "model"))
    assert result.exit_code == 2
    assert component in result.output
    assert not (tmp_path / "run").exists()


def damage_empty(pictures):
    for file in pictures.iterdir():
        file.unlink()


def damage_metadata(pictures):
    (pictures / "metadata.jsonl").write_text('{"file_name": "missing.png", "text": "not there"}\n')


def damage_picture(pictures):
    (pictures / "picture2.png").write_bytes(b"not a picture")


@pytest.mark.parametrize(
    ("damage", "named"),
    [(damage_empty, "pictures"), (damage_metadata, "missing.png"), (damage_picture, "picture2.png")],
)
def test_bad_images_end_with_exit_code_3(tmp_path, mini_flux, damage, named):
    recipe = write_recipe(tmp_path, mini_flux)
    damage(tmp_path / "pictures")
    result = invoke(recipe)
    assert result.exit_code == 3, result.output
    assert str(tmp_path / "pictures") in result.output
    assert named in result.output
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_nan_or_infinite_stops_the_run(tmp_path, mini_flux):
    recipe = write_recipe(tmp_path, mini_flux)
    result = invoke(recipe, "optimizer.lr=1e30", "train.max_grad_norm=null", "checkpoint.every=1")
    assert result.exit_code == 8
    assert "loss" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run" / "adapter").exists(), "nothing is exported"


def test_weights_that_are_nan_or_infinite_are_not_saved(tmp_path, mini_flux):
    """Such checkpoints, written between two rows of metrics, would replace the last good one."""
    recipe = write_recipe(tmp_path, mini_flux)
    settings = ("optimizer.lr=1e30", "train.steps=20", "output.log_every=10", "checkpoint.every=1")
    result = invoke(recipe, *settings, "checkpoint.keep=1")
    assert result.exit_code == 8
    assert "step 2" in result.output
    assert "adapter" in result.output
    (kept,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert kept.name == "step-000001"
    assert all(tensor.isfinite().all() for tensor in load_file(kept / ADAPTER_FILE).values())


def test_a_folder_with_other_files_is_not_written_to(tmp_path, mini_flux):
    recipe = write_recipe(tmp_path, mini_flux)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("keep me")
    result = invoke(recipe)
    assert result.exit_code == 2
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_the_schema_command_prints_the_schema():
    result = CliRunner().invoke(app, ["schema"])
    assert result.exit_code == 0
    assert "optimizer" in json.loads(result.output)["properties"]
