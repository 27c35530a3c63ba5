"""Checkpoints of published layouts with random weights, at toy size: they load in stock diffusers and train."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors import safe_open
from typer.testing import CliRunner

from halfbyte.quant.files.shards import ShardedWeights
from halfbyte.trainer.cli.app import train_app
from halfbyte.trainer.plan.published_configs import PUBLISHED
from halfbyte.trainer.training.metrics import read_metrics
from scripts.bench import make_checkpoint

from repository import RECIPES
from runs import write_pictures

T5 = {"flux": "text_encoder_2", "sd35_large": "text_encoder_3"}


@pytest.fixture(scope="module", params=make_checkpoint.MODELS)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp(model)
    make_checkpoint.make_checkpoint(folder, model, "toy", torch.device("cpu"))
    return folder


def test_the_checkpoint_has_the_hubs_layout_in_bf16(model, checkpoint):
    for part, file in (("transformer", "diffusion_pytorch_model"), (T5[model], "model")):
        index = json.loads((checkpoint / part / f"{file}.safetensors.index.json").read_text())
        shards = sorted((checkpoint / part).glob("*.safetensors"))
        assert sorted(set(index["weight_map"].values())) == [shard.name for shard in shards]
        assert len(shards) > 2
        with safe_open(shards[0], framework="pt") as opened:
            assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"BF16"}  # noqa: SIM118


def test_stock_diffusers_loads_the_checkpoint(checkpoint):
    pipeline = DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline("a cat", height=32, width=32, num_inference_steps=2, output_type="latent").images
    assert latents.isfinite().all()
    assert latents.std() < 10


def test_full_size_is_flux_dev_with_t5_xxl():
    """SD3.5's table of positions would take seconds; test_published_shapes.py counts its parameters."""
    pipeline = make_checkpoint.empty_pipeline("flux", "full")
    parts = ("transformer", "text_encoder", "text_encoder_2")
    count = {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in parts}
    assert count["transformer"] == 11_901_408_320
    assert count["text_encoder"] == 123_060_480
    # Meta parameters are not shared: the embedding counts twice.
    assert count["text_encoder_2"] - 32128 * 4096 == 4_762_310_656


def test_full_size_equals_the_published_configuration(model):
    assert make_checkpoint.shapes_of(model, "full") == PUBLISHED[make_checkpoint.MODELS[model].published]


def test_a_table_of_positions_is_not_random(model, checkpoint):
    with ShardedWeights(checkpoint / "transformer") as weights:
        tables = [name for name in weights.names if name.startswith("pos_embed") and "proj" not in name]
        assert tables == ([] if model == "flux" else ["pos_embed.pos_embed"])
        for name in tables:
            expected = get_2d_sincos_pos_embed(192, 32, base_size=64, output_type="pt")
            assert weights.read(name)[0].equal(expected.bfloat16())


@pytest.mark.parametrize("card", [6, 8])
def test_train_takes_two_steps_of_a_preset(card, model, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    write_pictures(tmp_path / "pictures")
    result = CliRunner().invoke(
        train_app,
        [
            str(RECIPES / f"{model}_{card}gb.yaml"),
            f"model.path={checkpoint}",
            "model.text_encoder_quant=int8",  # as in the recipes for T5-XXL
            "model.max_sequence_length=24",
            "quant.compute_dtype=float32",
            f"data.path={tmp_path / 'pictures'}",
            f"data.cache_dir={tmp_path / 'cache'}",
            "data.resolution=64",
            "train.steps=2",
            f"output.dir={tmp_path / 'run'}",
            *("output.self_check=false", "output.export_base=false"),
        ],
    )
    assert result.exit_code == 0, result.output
    steps = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [row.step for row in steps] == [1, 2]
    assert all(0 < row.loss < 10 for row in steps)
