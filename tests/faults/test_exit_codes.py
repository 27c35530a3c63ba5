"""Tests that processes end with the codes of the table in docs/commands.md, each with one message."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from halfbyte.trainer.runtime.signals import STOPPING, exit_code

from repository import ROOT
from run_server import RunServer
from runs import write_recipe

# Code that a command executes first.
UNEXPECTED = """
from halfbyte.trainer.recipe import load
def fails(*arguments, **options):
    raise KeyError("nobody expects this")
load.load_document = fails
"""
FULL_DEVICE = """
import torch
from halfbyte.trainer.families.encoders import PipelineEncoders
def fails(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory")
PipelineEncoders.encode_texts = fails
"""
NOT_A_NUMBER = """
from halfbyte.trainer.training.module import DiffusionModule
real = DiffusionModule.loss
DiffusionModule.loss = lambda *given: real(*given) + float("nan")
"""


@dataclass(frozen=True)
class Row:
    """A way to end with an exit code."""

    code: int
    settings: Sequence[str] = ()
    before: str = ""
    environ: tuple[tuple[str, str], ...] = ()
    damage: str = ""  # a file of the data that is emptied


ROWS = {
    "done": Row(0, ["--help"]),
    "an error that nobody expects": Row(1, before=UNEXPECTED),
    "an unknown key": Row(2, ["train.stepps=1"]),
    "an empty image": Row(3, damage="pictures/picture0.png"),
    "a model that is not here, without a network": Row(4, ["model.path=nobody/nothing"]),
    "a launcher's variables that do not fit": Row(5, environ=(("WORLD_SIZE", "many"), ("RANK", "0"))),
    "a device without memory": Row(6, before=FULL_DEVICE),
    "a disk without room": Row(6, ["data.cache_dir=/proc/nothing"]),
    "a loss that is NaN": Row(8, before=NOT_A_NUMBER),
}
# Codes that have tests of their own: 7 in tests/trainer/export/test_export.py, 9 in test_ranks.py, and those of the
# signals in test_signals.py.
ELSEWHERE = {7, 9, *(exit_code(number) for number in STOPPING)}


@pytest.mark.parametrize("name", ROWS)
def test_a_command_ends_with_its_code_and_one_message(
    server: RunServer, tmp_path: Path, mini_flux: Path, name: str
) -> None:
    row = ROWS[name]
    recipe = write_recipe(tmp_path, mini_flux)
    if row.damage:
        (tmp_path / row.damage).write_bytes(b"")
    process = server.start("train", str(recipe), *row.settings, before=row.before, environ=dict(row.environ))
    assert process.wait() == row.code, process.errors
    errors = [line for line in process.errors.splitlines() if line.startswith("error: ")]
    assert len(errors) == (row.code != 0), process.errors
    assert "Traceback" not in process.errors


def test_debug_shows_the_traceback_of_an_unexpected_error(
    server: RunServer, tmp_path: Path, mini_flux: Path
) -> None:
    recipe = write_recipe(tmp_path, mini_flux)
    process = server.start("train", str(recipe), "--debug", before=UNEXPECTED)
    assert process.wait() == 1
    assert "Traceback" in process.errors
    assert "KeyError" in process.errors


def test_each_row_of_the_table_is_tested() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    table = page.partition("## Exit codes")[2].partition("##")[0]
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    assert listed == {row.code for row in ROWS.values()} | ELSEWHERE
