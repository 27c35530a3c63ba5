"""Runs with each optimizer, average and LoRA variant: they resume bitwise identically, and stock diffusers agrees."""

import json

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from halfbyte.trainer.adapters.lora import load_adapter_state
from halfbyte.trainer.adapters.saved import ADAPTER_FILE
from halfbyte.trainer.denoiser.load import load_denoiser
from halfbyte.trainer.families.catalog import FAMILIES
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.run_folder import checkpoint
from halfbyte.trainer.run_folder.checkpoint import TRAINED_FILE
from halfbyte.trainer.runtime.world import read_world
from halfbyte.trainer.training.metrics import read_metrics

from judge import stock_bitsandbytes_on_cpu
from runs import run_here, write_recipe

# Optimizers and LoRA variants are independent, so each run covers one of both.
CASES = {
    "prodigy dora": (
        "optimizer={name: prodigy, d0: 1.0e-3}",
        "lr_schedule={name: cooldown, warmup_steps: 1}",
        "lora.dora=true",
        "train.grad_accumulation=1",
    ),
    "schedule-free rslora patterns": (
        "optimizer={name: schedule_free_adamw, lr: 1.0e-2}",
        "lr_schedule.warmup_steps=2",
        "lora.rslora=true",
        "lora.rank_pattern={proj_mlp: 2}",
        "lora.alpha_pattern={attn.to_q: 1.0}",
    ),
    "adafactor ema": (
        "optimizer={name: adafactor, lr: 1.0e-2}",
        "ema.decay=0.9",
        "ema.every=2",
        "train.grad_accumulation=1",
    ),
}
QUICK = ("sample.prompts=[]", "output.export_base=false", "checkpoint.every=10")
AVERAGED = {"schedule-free rslora patterns", "adafactor ema"}


@pytest.fixture(scope="module", params=list(CASES))
def case(request, tmp_path_factory, mini_flux):
    folder = tmp_path_factory.mktemp("case")
    recipe = write_recipe(folder, mini_flux)
    settings = (*CASES[request.param], "train.steps=4")
    # Checkpoints at other steps than in the runs compared with it: saving must not change the result.
    whole = run_here(recipe, *settings, "sample.prompts=[]", "checkpoint.every=3")
    return request.param, recipe, settings, whole


def rows(folder):
    return [(row.step, row.loss, row.grad_norm, row.lr) for row in read_metrics(folder / "metrics.csv")]


def adapter(folder):
    return load_file(folder / "adapter" / ADAPTER_FILE)


def test_it_resumes_bitwise_identically(case, tmp_path):
    _, recipe, settings, whole = case
    output = f"output.dir={tmp_path / 'resumed'}"
    # The same run with a checkpoint after step 2, from which it is resumed below.
    run_here(recipe, *settings, *QUICK, output, "checkpoint.every=2", "train.steps=4")
    for name in ("adapter", "summary.json"):
        path = tmp_path / "resumed" / name
        path.rename(tmp_path / name)
    saved = tmp_path / "resumed" / "checkpoints" / "step-000004"
    saved.rename(tmp_path / "last")
    resumed = run_here(recipe, *settings, *QUICK, output, "checkpoint.every=2", resume=True)
    assert rows(resumed) == rows(whole)
    ours, theirs = adapter(resumed), adapter(whole)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    again = resumed / "checkpoints" / "step-000004"
    for name in ("state.json", "optimizer.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / "last" / name).read_bytes(), name


def test_a_checkpoint_stores_the_averaged_adapter_under_the_usual_name(case):
    """Diffusers loads that file. The weights in training are in a second file if they differ from the average."""
    name, _, _, whole = case
    last = checkpoint.newest(whole / "checkpoints")
    seen = {key.removeprefix("transformer."): value for key, value in adapter(whole).items()}
    assert (last.folder / TRAINED_FILE).exists() == (name in AVERAGED)
    if name not in AVERAGED:
        assert last.average is None
        assert all(last.adapter[key].equal(seen[key]) for key in seen)
        return
    assert all(last.average[key].equal(seen[key]) for key in seen)
    assert not all(last.adapter[key].equal(seen[key]) for key in seen)


def test_a_finished_run_resumed_exports_the_same(case):
    _, recipe, settings, whole = case
    before = adapter(whole)
    run_here(recipe, *settings, "sample.prompts=[]", "checkpoint.every=3", resume=True)
    after = adapter(whole)
    assert all(after[name].equal(before[name]) for name in before)


def predict(transformer):
    draws = torch.Generator().manual_seed(0)
    config = transformer.config
    with torch.no_grad():
        return transformer.train()(
            hidden_states=torch.randn(1, 16, config.in_channels, generator=draws),
            encoder_hidden_states=torch.randn(1, 24, config.joint_attention_dim, generator=draws),
            pooled_projections=torch.randn(1, config.pooled_projection_dim, generator=draws),
            timestep=torch.tensor([0.5]),
            guidance=torch.tensor([1.0]),
            img_ids=torch.randn(16, 3, generator=draws),
            txt_ids=torch.zeros(24, 3),
            return_dict=False,
        )[0]


def test_stock_diffusers_predicts_what_was_trained(case, mini_flux):
    _, recipe, settings, whole = case
    loaded = load_recipe(recipe, settings)
    family = FAMILIES["flux"].open(str(mini_flux), None, 24)
    world = read_world({"ACCELERATE_USE_CPU": "true"})
    ours = load_denoiser(loaded, family, world, Console(quiet=True)).denoiser
    load_adapter_state(ours, {name.removeprefix("transformer."): t for name, t in adapter(whole).items()})
    with stock_bitsandbytes_on_cpu():
        base = FluxTransformer2DModel.from_pretrained(whole / "transformer", torch_dtype=torch.float32)
    bare = predict(base)
    pipeline = FluxPipeline.from_pretrained(mini_flux, transformer=base, torch_dtype=torch.float32)
    pipeline.load_lora_weights(whole / "adapter")
    stock = predict(pipeline.transformer)
    assert (stock - bare).norm() / bare.norm() > 1e-3, "the adapter has no effect on the output"
    assert (predict(ours) - stock).norm() / stock.norm() < 1e-5


def test_the_export_records_its_variant(case):
    name, _, _, whole = case
    with safe_open(whole / "adapter" / ADAPTER_FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        magnitudes = [key for key in file.keys() if key.endswith(".lora_magnitude_vector")]  # noqa: SIM118
    assert metadata["transformer.use_rslora"] == ("rslora" in name)
    assert metadata["transformer.use_dora"] == ("dora" in name) == bool(magnitudes)
    patterns = ({"proj_mlp": 2}, {"attn.to_q": 1.0}) if "patterns" in name else ({}, {})
    assert (metadata["transformer.rank_pattern"], metadata["transformer.alpha_pattern"]) == patterns


def test_two_small_batches_train_like_one_large_batch(tmp_path, mini_flux):
    """Gradients are accumulated and clipped, and the optimizer's step is not Adam's."""
    recipe = write_recipe(tmp_path, mini_flux)
    shared = (
        "optimizer={name: schedule_free_adamw, lr: 1.0e-2}",
        "train.max_grad_norm=0.05",
        "train.steps=3",
    )
    one, other = (
        run_here(
            recipe,
            *shared,
            *QUICK,
            f"train.batch_size={batch}",
            f"train.grad_accumulation={2 // batch}",
            f"output.dir={tmp_path / str(batch)}",
        )
        for batch in (1, 2)
    )
    for small, large in zip(rows(one), rows(other), strict=True):
        assert small == pytest.approx(large, rel=1e-3)
        assert small[2] > 0.05, "nothing was clipped"
    ours, theirs = adapter(one), adapter(other)
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-3), name
