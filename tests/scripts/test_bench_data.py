"""The benches of data at toy size, as a user runs them: a cold cache, and waiting for batches from a warm one."""

import json
import sys

import pytest

from scripts.bench.data import batches, encode, load


def run(monkeypatch, bench, *options):
    monkeypatch.setattr(sys, "argv", [bench.__name__, *map(str, options)])
    bench.main()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


TOY = ("--images", "3", "--px", "32", "--megapixels", "0.005", "--size", "toy")


def test_a_cold_cache_and_then_a_warm_one(work, tmp_path, monkeypatch, capsys):
    run(
        monkeypatch,
        encode,
        work,
        *TOY,
        "--set",
        "model.max_sequence_length=8",
        "--json",
        tmp_path / "cold.json",
    )
    cold = json.loads((tmp_path / "cold.json").read_text())
    assert (cold["images"], cold["px"], cold["size"]) == (3, 32, "toy")
    assert {times["kind"]: times["entries"] for times in cold["encoders"]} == {"texts": 4, "latents": 3}
    assert cold["cache_gb"] > 0
    assert 0 < cold["phases"]["encoding"] < cold["seconds"]
    assert cold["images_per_second"] == pytest.approx(3 / cold["seconds"])
    assert "encoded 3 latents" in capsys.readouterr().out

    options = ("--step", "0.01", "--steps", "4", "--batch", "1", "--json", tmp_path / "warm.json")
    run(monkeypatch, load, work, *TOY, "--set", "model.max_sequence_length=8", *options)
    plain, ahead = json.loads((tmp_path / "warm.json").read_text())
    assert (plain["way"], ahead["way"]) == ("plain", "ahead")
    for one in (plain, ahead):
        assert one["steps"] == 4
        assert 0 <= one["share"] == pytest.approx(one["wait_s"] / one["seconds"])
        assert one["seconds"] > 0.04


def test_rows_of_batches_are_compared(work, tmp_path, monkeypatch):
    options = ("--batches", "2", "--quant", "none", "--repeats", "1", "--json", tmp_path / "rows.json")
    run(monkeypatch, batches, work, "--px", "32", "--size", "toy", *options)
    rows = json.loads((tmp_path / "rows.json").read_text())
    whats = ("VAE torch.float32", "VAE torch.bfloat16", "T5 none")
    assert [(row["what"], row["batch"]) for row in rows] == [(what, 2) for what in whats]
    assert all(row["ms"] > 0 for row in rows)
    assert all(row["same next to others"] and row["same in a second run"] for row in rows)
    assert all(row["distance from alone"] < 0.01 for row in rows)
