"""A start from a checkpoint of FLUX.1-dev's layout: made by the script, timed by the script, at toy size."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open

from runs import write_pictures

ROOT = Path(__file__).parent.parent
PHASES = ("import", "encode", "attention", "transformer", "adapters", "first step")
OVERRIDES = [
    "data.resolution=64",
    "model.max_sequence_length=24",
    "quant.compute_dtype=float32",
    "lora.rank=4",
    "train.steps=2",
]


def script(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        made = script("make_checkpoint", patch)
        made.make_checkpoint(folder, made.SIZES["toy"], torch.device("cpu"))
    return folder


def test_the_checkpoint_has_the_hubs_layout_in_bf16(checkpoint):
    for part, file in (("transformer", "diffusion_pytorch_model"), ("text_encoder_2", "model")):
        index = json.loads((checkpoint / part / f"{file}.safetensors.index.json").read_text())
        shards = sorted((checkpoint / part).glob("*.safetensors"))
        assert sorted(set(index["weight_map"].values())) == [shard.name for shard in shards]
        assert len(shards) > 2
        with safe_open(shards[0], framework="pt") as opened:
            assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"BF16"}  # noqa: SIM118


def test_stock_diffusers_loads_the_checkpoint(checkpoint):
    pipeline = FluxPipeline.from_pretrained(checkpoint, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline("a cat", height=32, width=32, num_inference_steps=2, output_type="latent").images
    assert latents.isfinite().all()
    assert latents.std() < 10


def test_full_size_is_flux_dev_with_t5_xxl(monkeypatch):
    made = script("make_checkpoint", monkeypatch)
    pipeline = made.empty_pipeline(made.SIZES["full"])
    count = {
        name: sum(p.numel() for p in getattr(pipeline, name).parameters())
        for name in ("transformer", "text_encoder", "text_encoder_2")
    }
    assert count["transformer"] == 11_901_408_320
    assert count["text_encoder"] == 123_060_480
    # Meta parameters are not shared: the embedding counts twice.
    assert count["text_encoder_2"] - 32128 * 4096 == 4_762_310_656


def test_a_start_is_measured_phase_by_phase(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    phases = script("start_phases", monkeypatch)
    write_pictures(tmp_path / "pictures")
    overrides = [
        *OVERRIDES,
        f"model.path={checkpoint}",
        f"data.path={tmp_path / 'pictures'}",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]
    starts = [
        phases.start(ROOT / "recipes" / "flux_lora.yaml", [*overrides, f"output.dir={tmp_path / name}"], 0.0)
        for name in ("cold", "warm")
    ]
    for start in starts:
        assert [phase.name for phase in start.phases] == list(PHASES)
        assert all(phase.seconds >= 0 for phase in start.phases)
        assert start.phases[1].host_anon > 0.05
        assert start.first_loss_finite
        assert start.host_peak > 0.05
        assert start.packed_base_bytes == starts[0].packed_base_bytes
    assert len([path for path in (tmp_path / "cache" / "bases").iterdir() if path.is_dir()]) == 1
    bench = script("bench_start", monkeypatch)
    rows = [{"row": "cold", "left_in_page_cache": 0.5, **phases.as_json(starts[0])}]
    text = bench.table(rows)
    assert len(text.splitlines()) == 1 + len(PHASES) + 1
    assert "50%" in text


def test_pages_are_dropped_and_counted(tmp_path, monkeypatch):
    bench = script("bench_start", monkeypatch)
    (tmp_path / "file").write_bytes(bytes(10**6))
    left = bench.drop_pages([tmp_path])
    assert left is None or 0 <= left <= 1
    monkeypatch.setattr(bench, "_RATE_BYTES", 2**25)
    measured = bench.disk_rates(tmp_path)
    assert min(measured["write"], measured["read"], measured["read_again"]) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
