"""The quality bench: its statistics, and all of it on the tiny model for a few steps."""

import json
import sys

import numpy
import pytest

from scripts.bench.quality import run as bench_quality
from scripts.bench.quality.bases import BF16, NF4, PEER
from scripts.bench.quality.jobs import Trained, Velocities
from scripts.bench.quality.table import Interval, trained_rows, velocity_row, verdicts

from runs import write_recipe


def test_an_interval_is_students():
    """Of 1, 2, 3, 4: t(0.975, 3) = 3.182, s = sqrt(5/3)."""
    interval = Interval.of([1.0, 2.0, 3.0, 4.0])
    assert interval.mean == 2.5
    assert interval.half == pytest.approx(3.182 * (5 / 3) ** 0.5 / 2, rel=1e-6)
    assert Interval.of([2.0]).half == float("inf")
    many = Interval.of([float(number % 2) for number in range(100)])
    assert many.half == pytest.approx(1.96 * (25 / 99) ** 0.5 / 10, rel=1e-6)


def runs(base, losses):
    return [
        Trained(base, seed, 1.0, loss, {0.5: loss}, 10.0) for seed, loss in reversed(list(enumerate(losses)))
    ]


def rows_of(nf4, peer):
    bf16 = [0.50, 0.60, 0.70]
    results = runs(BF16.name, bf16) + runs(NF4.name, nf4) + runs(PEER.name, peer)
    return trained_rows(results)


def test_differences_are_taken_within_a_seed():
    rows = rows_of([0.505, 0.606, 0.707], [0.50, 0.60, 0.70])
    assert rows[1].against_bf16.mean == pytest.approx(1)
    assert rows[1].against_bf16.half == pytest.approx(0, abs=1e-9), "the spread of the seeds is not in it"
    assert rows[1].after.half > 0.1, "though the losses themselves differ by it"
    assert rows[1].against_peer.mean == pytest.approx(1)
    assert rows[0].against_bf16.mean == 0


@pytest.mark.parametrize(
    ("nf4", "peer", "held"),
    [
        ([0.502, 0.601, 0.703], [0.502, 0.601, 0.703], [True, True]),
        ([0.520, 0.620, 0.730], [0.521, 0.621, 0.731], [False, True]),
        ([0.502, 0.603, 0.7035], [0.500, 0.600, 0.7001], [True, False]),
        ([0.502, 0.603, 0.7035], [0.500, 0.606, 0.7005], [True, True]),  # worse on average, within the noise
    ],
)
def test_bars(nf4, peer, held):
    assert [verdict.held for verdict in verdicts(rows_of(nf4, peer))] == held


def test_the_best_that_was_made_of_nf4_is_judged_as_well():
    bf16 = [0.50, 0.60, 0.70]
    results = [
        *runs(BF16.name, bf16),
        *runs(NF4.name, [0.53, 0.63, 0.73]),
        *runs("nf4, calibrated", [0.52, 0.62, 0.72]),
        *runs("nf4, calibrated, x_embedder in bf16", [0.503, 0.602, 0.703]),
    ]
    verdict = verdicts(trained_rows(results))[1]
    assert verdict.bar.startswith("nf4, calibrated, x_embedder in bf16")
    assert verdict.held


def test_velocity_errors_are_relative_to_bf16_by_level():
    levels = [0.1, 0.9, 0.1, 0.9]
    exact = Velocities("bf16", levels, [numpy.array([3.0, 4.0])] * 4, 1.0)
    off = [numpy.array([3.0, 4.0 + error], dtype=numpy.float32) for error in (0.5, 1.0, 0.5, 2.0)]
    row = velocity_row(Velocities("nf4", levels, off, 1.5), exact, {"nf4": 0.25})
    assert (row.base, row.kept, row.loss) == ("nf4", 0.25, 1.5)
    assert row.by_sigma[0.1].mean == pytest.approx(0.1)
    assert row.by_sigma[0.1].half == pytest.approx(0)
    assert row.by_sigma[0.9].mean == pytest.approx(0.3)
    assert row.relative.mean == pytest.approx(0.2)


def test_the_complete_benchmark_on_the_tiny_model(mini_flux, tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, mini_flux)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    settings = [
        "validation.held_out=2",
        "train.steps=2",
        "train.grad_accumulation=1",
        "quant.compute_dtype=bfloat16",
    ]
    options = ["--seeds", "2", "--kinds", "0", "--only", f"{PEER.name};nf4, loftq"]
    files = ["--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")]
    monkeypatch.setattr(
        sys, "argv", ["bench_quality.py", "--recipe", str(recipe), *options, *files, *settings]
    )
    bench_quality.main()
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["base"] for row in found["trained"]] == [BF16.name, NF4.name, PEER.name, "nf4, loftq"]
    bf16, nf4, peer, loftq = found["trained"]
    assert bf16["against_bf16"]["mean"] == 0
    assert bf16["before"] != nf4["before"]
    assert nf4["before"] == pytest.approx(peer["before"], rel=1e-3), "the same codes"
    assert [run["seed"] for run in found["runs"]] == [0, 1] * 4
    assert found["runs"][0]["after"] != found["runs"][1]["after"]
    assert loftq["before"] != nf4["before"]
    errors = {row["base"]: row["relative"]["mean"] for row in found["untrained"]}
    assert errors[NF4.name] == pytest.approx(errors[PEER.name], rel=0.05)
    assert 0.01 < errors[NF4.name] < 0.5
    assert (tmp_path / "out.md").read_text() in capsys.readouterr().out
    assert not list(tmp_path.glob("bf16*")), "runs are deleted"


def test_skip_lists_mean_the_layers_they_name(mini_flux, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    recipe = write_recipe(tmp_path, mini_flux)
    skips = bench_quality.skips_of(bench_quality.Bench(recipe, ["validation.held_out=2"], tmp_path), 0.1)
    names = [kind.name for kind in skips.kinds]
    assert "nf4, x_embedder in bf16" in names
    assert "nf4, single_transformer_blocks.*.proj_mlp in bf16" in names
    assert all(0 < kind.kept < 0.5 for kind in skips.kinds)
    # The last layer's name is also the end of other layers' paths, so no list means it alone.
    assert 0.95 < sum(kind.kept for kind in skips.kinds) < 1
    assert 0 < skips.worst.kept < 0.3
