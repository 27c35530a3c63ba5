"""The sampling benchmark: a row on the mini pipeline, failing rows, the table and its verdicts."""

import json
import sys

import pytest

from scripts.bench import sample as bench_sample


def run(monkeypatch, *options):
    # On shared processors, threads that spin while they wait take time from the others.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["bench_sample.py", *map(str, options)])
    bench_sample.main()


def test_a_row_is_measured_and_gpu_rows_are_reported_as_left_out(tmp_path, monkeypatch, capsys):
    if bench_sample.torch.cuda.is_available():
        pytest.skip("with a GPU no row is left out")
    run(
        monkeypatch,
        *("--model", "flux_mini", "--px", "64", "--steps", "1,2", "--forwards", "2"),
        *("--rows", "ours nf4;bitsandbytes nf4, compiled", "--json", tmp_path / "out.json"),
        *("--markdown", tmp_path / "out.md"),
    )
    ours, peer = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (ours["row"], ours["state"]) == ("ours nf4", "done")
    (result,) = ours["results"]
    assert result["forward_ms"] >= result["fastest_ms"] > 0
    assert result["pictures_s"].keys() == {"1", "2"}
    assert 1e3 * result["pictures_s"]["2"] > result["fastest_ms"]
    assert (peer["state"], peer["results"]) == ("left out: needs a CUDA device", [])
    text = (tmp_path / "out.md").read_text()
    assert text in capsys.readouterr().out
    assert "| bitsandbytes nf4, compiled | left out: needs a CUDA device |" in text


def test_no_row_starts_after_the_time_limit(tmp_path, monkeypatch):
    run(
        monkeypatch,
        *("--model", "flux_mini", "--px", "64", "--seconds", "0", "--attention", "cpu"),
        *("--rows", "ours nf4", "--json", tmp_path / "out.json"),
    )
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["state"] == "left out: the 0.0 s are over"


@pytest.mark.parametrize(
    ("does", "state"),
    [
        ("import sys; sys.exit('out of memory')", "failed (1): out of memory"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "failed (-11): it said nothing"),
        ("import time; time.sleep(60)", "stopped after 2 s"),
    ],
)
def test_a_failed_row_is_reported_with_its_results_so_far(tmp_path, does, state):
    found = tmp_path / "found.json"
    writes = f"import json, pathlib; pathlib.Path({str(found)!r}).write_text(json.dumps([1])); "
    seconds = 2 if "sleep" in does else 60
    assert bench_sample.run_apart([sys.executable, "-c", writes + does], found, seconds) == (state, [1])


def row(name, forward_ms, state="done", graphs=None):
    result = {
        "px": 1024,
        "forward_ms": forward_ms,
        "fastest_ms": forward_ms,
        "first_s": 1.0,
        "peak_gib": 9.0,
        "graphs": graphs,
        "pictures_s": {"28": 5.0},
    }
    return {"row": name, "state": state, "results": [result]}


@pytest.mark.parametrize(("ours", "expected"), [(140.0, ["held", "held"]), (169.0, ["missed", "held"])])
def test_the_verdicts(ours, expected):
    rows = [row("ours nf4, compiled", ours), row("diffusers bf16, compiled", 155.0, "failed (1): later")]
    arguments = bench_sample.argparse.Namespace(model="flux", px="1024", steps="28,50")
    text = bench_sample.table(arguments, rows)
    assert "Limit 94 ms" in text
    verdicts = [
        line.rstrip(".").split(", ")[-1] for line in text.splitlines() if line.endswith(("held.", "missed."))
    ]
    assert verdicts == expected
    assert "(failed (1): later)" in text
    assert "| 5.00 s | not measured |" in text


@pytest.mark.parametrize(
    ("graphs", "label", "peak"),
    [
        (None, "ours nf4, compiled |", "9.0 GiB |"),
        (2, "ours nf4, compiled, CUDA graphs |", "9.0 GiB reserved |"),
        (0, "ours nf4, compiled, CUDA graphs NOT recorded |", "9.0 GiB reserved |"),
    ],
)
def test_the_table_names_recorded_rows_and_the_kind_of_memory(graphs, label, peak):
    arguments = bench_sample.argparse.Namespace(model="flux", px="1024", steps="28")
    text = bench_sample.table(arguments, [row("ours nf4, compiled", 140.0, graphs=graphs)])
    (line,) = [line for line in text.splitlines() if "ours nf4" in line]
    assert line.startswith(f"| {label}")
    assert line.endswith(peak)
