"""What the commands tell about themselves."""

import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from halfbyte.trainer.cli.app import app

COMMANDS = ["train", "export", "push", "plan", "schema", "cache", "quant-report", "sample", "quantize"]


def shown(*arguments):
    result = CliRunner().invoke(app, [*arguments, "--help"], terminal_width=80)
    assert result.exit_code == 0
    return result.output


def test_every_command_is_listed_with_a_whole_sentence():
    listed = shown().partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == COMMANDS
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)


@pytest.mark.parametrize("command", COMMANDS)
def test_exit_codes_are_told(command):
    assert "Exit codes: 0 done, 2 " in shown(command)


def test_what_stands_in_brackets_is_shown():
    text = " ".join(shown("sample").split())
    assert "several with commas, for every prompt. [a run: as it drew its own; else 0]" in text
    assert re.search(r"Sampling steps\. +\[the run's, else 28\]", text)
    assert "[if exported; one there is kept]" in " ".join(shown("push").split())


def test_a_schema_that_cannot_be_written_is_one_message(tmp_path):
    result = CliRunner().invoke(app, ["schema", str(tmp_path / "none" / "x.json")])
    assert result.exit_code == 2
    assert "cannot be written" in result.output


def test_libraries_say_nothing_when_they_are_imported():
    quiet = "from halfbyte.trainer.cli.console import quieten_libraries; quieten_libraries()"
    start = f"{quiet}; import diffusers.loaders.peft"
    said = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=True)
    assert said.stdout + said.stderr == ""
