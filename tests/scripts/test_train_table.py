"""Tests the report page of the training benchmark: reference rows, targets and verdicts."""

import pytest

from scripts.bench.train_table import page, rival


def result(row, median_s, px=1024, checkpoint="none", **more):
    return {
        "model": "flux",
        "row": row,
        "px": px,
        "checkpoint": checkpoint,
        "state": "done",
        "median_s": median_s,
        "min_s": median_s,
        "peak_gib": 20.0,
        "graphs": 1 if "graphs" in row else None,
        "stream": False,
        **more,
    }


def left_out(row, why, checkpoint="none"):
    return {"model": "flux", "row": row, "px": 1024, "checkpoint": checkpoint, "state": f"left out: {why}"}


def cells(text, row, size="1024, none"):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {size} | {row}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def verdicts(text):
    return [line for line in text.splitlines() if line.startswith("- ")]


def test_a_row_next_to_bf16_the_peer_and_its_target():
    text = page(
        [result("ours, graphs", 0.361), result("bf16, graphs", 0.366), result("peer, compiled", 0.476)]
    )
    assert cells(text, "ours, graphs")[2:] == [
        *("0.361 s (0.361)", "20.00 GiB reserved"),
        *("0.99 (bf16, graphs)", "0.76 (peer, compiled)", "0.36 then 0.31"),
    ]
    assert cells(text, "bf16, graphs")[4:] == ["", "0.77 (peer, compiled)", ""]
    assert cells(text, "peer, compiled")[3:] == ["20.00 GiB", "1.30 (bf16, graphs)", "", ""]
    assert verdicts(text) == [
        "- 1024 px, none, ours, graphs, 0.361 s: target at most 0.36 s, missed by 0.001 s; target at most 0.31 s,"
        " missed by 0.051 s; 0.99 of bf16, graphs, target at most 1.10, held by 0.114."
    ]


@pytest.mark.parametrize(
    ("px", "checkpoint", "seconds", "target"),
    [
        (1024, "selective", 0.45, "target at most 0.50 s, held by 0.050 s; target at most 0.42 s, missed by 0.030 s"),
        (1024, "full", 0.41, "target at most 0.50 s, held by 0.090 s; target at most 0.42 s, held by 0.010 s"),
        (1024, "none", 0.30, "target at most 0.36 s, held by 0.060 s; target at most 0.31 s, held by 0.010 s"),
        (512, "full", 0.19, "target at most 0.18 s, missed by 0.010 s"),
        (512, "selective", 0.18, "target at most 0.18 s, held by 0.000 s"),
        (512, "none", 0.12, "target at most 0.13 s, held by 0.010 s"),
    ],
)  # fmt: skip
def test_the_target_of_a_step(px, checkpoint, seconds, target):
    (verdict,) = verdicts(page([result("ours", seconds, px, checkpoint)]))
    assert verdict == f"- {px} px, {checkpoint}, ours, {seconds:.3f} s: {target}."


@pytest.mark.parametrize(
    "one",
    [
        result("ours", 0.4, checkpoint="offload"),
        result("ours", 0.4, px=768),
        result("ours", 0.7, stream=True),
        result("ours by layer", 0.6),
        result("bf16", 0.4),
        result("ours", 0.2, model="sd35_large"),
    ],
)
def test_nothing_was_asked_of_the_others(one):
    assert verdicts(page([one])) == []


def test_a_row_is_compared_with_the_same_kind_or_else_the_fastest():
    ours, by_layer = result("ours", 0.48), result("ours by layer, compiled", 0.6)
    bf16 = [result("bf16", 0.46), result("bf16, graphs", 0.36)]
    peers = [result("peer", 0.9), result("peer, compiled", 0.5), result("peer, compiled", 0.1, px=512)]
    results = [ours, by_layer, *bf16, *peers]
    assert rival(ours, "bf16", results) is bf16[0]
    assert rival(by_layer, "bf16", results) is bf16[1]
    assert rival(ours, "peer", results) is peers[1]
    assert rival(peers[0], "peer", results) is None
    assert rival(ours, "bf16", [ours, left_out("bf16", "later")]) is None


def test_slower_than_bf16_by_too_much():
    (verdict,) = verdicts(page([result("ours", 0.6, 768), result("bf16", 0.5, 768)]))
    assert verdict.endswith("0.600 s: 1.20 of bf16, target at most 1.10, missed by 0.100.")


def test_rows_of_one_size_are_grouped_and_omitted_rows_give_the_reason():
    text = page(
        [
            result("ours, graphs", 0.361),
            result("ours, graphs", 0.421, checkpoint="selective"),
            result("peer", 0.9),
            left_out("peer", "knows none, full", "selective"),
        ]
    )
    sizes = [line.split("|")[1].strip() for line in text.splitlines()[2:6]]
    assert sizes == ["1024, none", "1024, none", "1024, selective", "1024, selective"]
    assert cells(text, "peer", "1024, selective")[2:] == ["left out: knows none, full", "", "", "", ""]


def test_a_step_that_was_not_recorded_is_reported():
    text = page([result("ours, graphs", 0.5, graphs=0)])
    assert "| ours, graphs: CUDA graphs NOT recorded |" in text


def test_profiles_have_a_table_of_their_own():
    profiles = [{"product": 80.0, "adapter": 9.04, "idle": 1.0}, {"product": 90.0, "idle": 2.0}]
    text = page([result("ours", 0.4, profile_ms=profiles[0]), result("bf16", 0.4, profile_ms=profiles[1])])
    after = text.split("Where a step goes, ms:")[1]
    assert "| px, checkpointing | row | product | adapter | idle |" in after
    assert cells(after, "ours")[2:] == ["80.0", "9.0", "1.0"]
    assert cells(after, "bf16")[2:] == ["90.0", "", "2.0"]
    assert "Where a step goes" not in page([result("ours", 0.4)])
