"""The training bench on the miniature, as a user runs it: timing, and what it refuses."""

import json
import sys

import bench_train
import pytest

MINI = ("--model", "flux_mini", "--px", "64", "--rank", "8")


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["bench_train.py", *map(str, options)])
    bench_train.main()


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_ours_bf16_and_the_peer_in_one_run(tmp_path, monkeypatch, capsys):
    if bench_train.torch.cuda.is_available():
        pytest.skip("with a GPU no row is left out")
    run(
        monkeypatch,
        *(*MINI, "--rows", "ours, graphs;ours;bf16;peer", "--checkpoint", "none", "--steps", "2"),
        *("--profile", "1", "--json", tmp_path / "out.json", "--markdown", tmp_path / "out.md"),
    )
    results = {one["row"]: one for one in read(tmp_path / "out.json")}
    assert list(results) == ["ours, graphs", "ours", "bf16", "peer"]
    assert results["ours, graphs"]["state"] == "left out: needs a CUDA device"
    for row, one in results.items():
        assert (one["model"], one["px"], one["checkpoint"], one["device"]) == ("flux_mini", 64, "none", "CPU")
        assert one["torch"] == bench_train.torch.__version__
        assert one["attention"] == ("torch's choice" if row == "peer" else "cpu")
        if row != "ours, graphs":
            assert one["state"] == "done"
            assert one["median_s"] >= one["min_s"] > 0
            assert one["peak_gib"] is None
            assert one["profile_ms"]["adapter"] > 0
            assert one["profile_ms"]["product"] > 0
            assert (one["profile_ms"]["dequantize"] > 0) is (row != "bf16")
    text = (tmp_path / "out.md").read_text()
    assert text in capsys.readouterr().out
    ours, bf16, peer = (results[row]["median_s"] for row in ("ours", "bf16", "peer"))
    assert f"| 64, none | ours | {ours:.3f} s" in text
    assert f"| {ours / bf16:.2f} (bf16) | {ours / peer:.2f} (peer) |" in text
    assert "| 64, none | ours, graphs | left out: needs a CUDA device |" in text
    assert "Where a step goes" in text


def test_a_checkpointing_that_a_row_does_not_know_is_left_out(tmp_path, monkeypatch):
    options = "--rows", "peer;ours by layer", "--checkpoint", "selective,offload"
    run(monkeypatch, *MINI, *options, "--json", tmp_path / "out.json")
    results = read(tmp_path / "out.json")
    assert [one["row"] for one in results] == ["peer", "peer", "ours by layer", "ours by layer"]
    assert {one["state"] for one in results} == {"left out: knows none, full"}


def test_what_a_row_knows_of_checkpointing():
    known = {name: row.checkpoints for name, row in bench_train.ROW.items()}
    assert known["ours"] == known["bf16"] == ("none", "selective", "full", "offload")
    assert known["ours, graphs"] == known["bf16, graphs"] == ("none", "selective", "full")
    assert known["peer, compiled"] == known["ours by layer, compiled"] == ("none", "full")


def test_results_are_kept_and_shown_when_a_later_row_fails(tmp_path, monkeypatch, capsys):
    measure = bench_train.TrainedModel.measure

    def fails(model, px, steps):
        if model.row.name == "bf16":
            raise RuntimeError("out of memory")
        return measure(model, px, steps)

    monkeypatch.setattr(bench_train.TrainedModel, "measure", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(monkeypatch, *MINI, "--rows", "ours;bf16;peer", "--steps", "1", "--json", tmp_path / "out.json")
    assert [one["row"] for one in read(tmp_path / "out.json")] == ["ours"]
    assert "| 64, full | ours |" in capsys.readouterr().out


def test_a_rank_whose_products_cannot_be_told_apart_is_profiled_without_them(monkeypatch, capsys):
    run(monkeypatch, *MINI, "--rank", "16", "--rows", "bf16", "--steps", "1", "--profile", "1")
    told = capsys.readouterr().out
    assert "adapters count as products: products of adapters of rank 16 have sides of [16, 64]" in told
    assert "adapter |" not in told.split("Where a step goes")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rows", "ours,bf16"), "--rows: got ours,bf16, accepted: ours, graphs; ours;"),
        (("--rows", "ours;mine"), "--rows: got mine, accepted"),
        (("--checkpoint", "none,some"), "--checkpoint: got some, accepted: none, selective, full, offload"),
        (("--stream",), "--stream is for --rows ours"),
        (("--rows", "ours, graphs", "--stream"), "--stream is for --rows ours"),
        (("--budget", "6"), "--budget: needs a CUDA device"),
    ],
)
def test_what_is_refused(monkeypatch, capsys, options, message):
    if "--budget" in options and bench_train.torch.cuda.is_available():
        pytest.skip("a GPU can be held to a budget")
    with pytest.raises(SystemExit) as refused:
        run(monkeypatch, *MINI, *options)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
