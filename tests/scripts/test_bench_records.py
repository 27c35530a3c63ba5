"""Tests that the bench of many records runs."""

from pathlib import Path

import pytest

from scripts.bench.data.records import measure, write_shards


def test_every_step_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path / "shards", 40)
    measure(tmp_path, 40)
    lines = capsys.readouterr().out.splitlines()
    assert [line[11:27].strip() for line in lines] == [
        "first start",
        "later start",
        "held-out images",
        "record",
        "views",
        "order",
        "one epoch",
    ]
