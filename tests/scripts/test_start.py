"""The start-up benchmark on a toy checkpoint of FLUX.1-dev's layout."""

import importlib

import pytest
import torch

from scripts.bench.make_checkpoint import make_checkpoint

from repository import ROOT
from runs import write_pictures

PHASES = ("import", "encode", "attention", "transformer", "adapters", "first step")
OVERRIDES = [
    "data.resolution=64",
    "model.max_sequence_length=24",
    "quant.compute_dtype=float32",
    "lora.rank=4",
    "train.steps=2",
]


def script(name, monkeypatch):
    return importlib.import_module(f"scripts.bench.{name}")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    make_checkpoint(folder, "flux", "toy", torch.device("cpu"))
    return folder


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
    bench = script("start", monkeypatch)
    rows = [{"row": "cold", "left_in_page_cache": 0.5, **phases.as_json(starts[0])}]
    text = bench.table(rows)
    assert len(text.splitlines()) == 1 + len(PHASES) + 1
    assert "50%" in text


def test_pages_are_dropped_and_counted(tmp_path, monkeypatch):
    bench = script("start", monkeypatch)
    (tmp_path / "file").write_bytes(bytes(10**6))
    left = bench.drop_pages([tmp_path])
    assert left is None or 0 <= left <= 1
    monkeypatch.setattr(bench, "_RATE_BYTES", 2**25)
    measured = bench.disk_rates(tmp_path)
    assert min(measured["write"], measured["read"], measured["read_again"]) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
