"""Tests the help texts of the commands, and that importing the libraries prints nothing."""

import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from halfbyte.trainer.cli.app import app

COMMANDS = [
    "train",
    "export",
    "push",
    "plan",
    "data",
    "schema",
    "cache",
    "quant-report",
    "sample",
    "quantize",
]


def help_text(*arguments):
    result = CliRunner().invoke(app, [*arguments, "--help"], terminal_width=80)
    assert result.exit_code == 0
    return result.output


def option_help(command, option):
    """The help of one option on one line."""
    lines = help_text(command).splitlines()
    (start,) = (n for n, line in enumerate(lines) if re.match(rf"  {option}\b", line))
    rest = (n for n, line in enumerate(lines[start + 1 :], start + 1) if re.match(r"  \S|$", line))
    return " ".join(" ".join(lines[start : next(rest, len(lines))]).split())


def test_every_command_is_listed_with_a_complete_sentence():
    listed = help_text().partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == COMMANDS
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_exit_codes(command):
    assert "Exit codes: 0 done, 2 " in help_text(command)


def test_help_shows_defaults_in_brackets():
    # rich would take them for markup and hide them.
    for option, default in (("--steps", "28"), ("--seed", "0"), ("--guidance-scale", "3.5")):
        assert re.search(rf"\[[^\]]*\b{default}\]", option_help("sample", option)), option
    assert re.search(r"\[[^\]]+\]", option_help("push", "--base"))


def test_a_schema_that_cannot_be_written_is_one_error_message(tmp_path):
    file = tmp_path / "none" / "x.json"
    result = CliRunner().invoke(app, ["schema", str(file)])
    assert result.exit_code == 2
    assert result.output.count("error: ") == 1
    assert f"error: {file}: " in result.output


def test_importing_the_libraries_prints_nothing():
    program = """
from halfbyte.trainer.cli.console import library_imports
with library_imports():
    import diffusers.loaders.peft
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
