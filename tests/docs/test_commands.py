"""Commands in the documentation name real scripts, commands, options and files."""

import re
import shlex
import textwrap

import pytest
from typer.testing import CliRunner

from halfbyte.trainer import errors
from halfbyte.trainer.cli.app import app
from halfbyte.trainer.recipe.schema import SchemaTree, json_schema
from halfbyte.trainer.runtime.signals import STOPPING, exit_code

from doc_pages import PAGES, all_blocks, hooks, name_of, prose
from repository import ROOT

_PROGRAM = re.compile(r"scripts/|\.venv/bin/|(halfbyte|torchrun|accelerate|python) ")
_INDENTED = re.compile(r"^(?:    [^\n]*\n)+", re.MULTILINE)
LAUNCHERS = {"accelerate", "torchrun", "python"}


def command_lines() -> list[tuple[str, list[str]]]:
    """Returns every shell command: lines of code that start with a program we know."""
    code = [(str(block), block.code) for block in all_blocks("", "bash", "sh")]
    # The benchmark pages indent their commands.
    code += [
        (name_of(page), textwrap.dedent(part)) for page in PAGES for part in _INDENTED.findall(prose(page))
    ]
    return [
        (place, shlex.split(line, comments=True))
        for place, text in code
        for line in text.replace("\\\n", " ").splitlines()
        if _PROGRAM.match(line)
    ]


LINES = command_lines()


@pytest.mark.parametrize(
    ("place", "words"), LINES, ids=[f"{place}: {' '.join(words)[:60]}" for place, words in LINES]
)
def test_commands_are_real(place: str, words: list[str]) -> None:
    program = words[0].removeprefix(".venv/bin/")
    if program.startswith("scripts/"):
        assert (ROOT / program).is_file()
        if program == "scripts/train":
            check_options("train", words[1:])
        return
    if program == "halfbyte":
        check_options(words[1], words[2:])
        return
    if program == "pip":
        return
    assert program in LAUNCHERS
    module = words[words.index("-m") + 1]
    assert module == "halfbyte.trainer" or is_module(module)
    if module == "halfbyte.trainer":
        check_options("train", words[words.index("-m") + 2 :])


def is_module(name: str) -> bool:
    path = ROOT / name.removeprefix("halfbyte.").replace(".", "/")
    return path.with_suffix(".py").is_file()


def check_options(command: str, words: list[str]) -> None:
    """Fails where a word is no option of the command, no setting and no file."""
    parameters = hooks.parameters_of(hooks.commands()[command])
    options = {name for parameter in parameters if not parameter.is_argument for name in parameter.options}
    for word in words:
        if word.startswith("--"):
            assert word in options
        elif re.fullmatch(r"\w+(\.\w+)*=.*", word, re.DOTALL):
            assert "." not in word.split("=")[0] or word.split("=")[0] in SETTINGS
        elif word.startswith("recipes/"):
            assert (ROOT / word).is_file()


def settings() -> set[str]:
    """Returns the dotted names of all settings of a recipe."""
    return {".".join(map(str, path)) for path, _ in SchemaTree(json_schema()).fields()}


SETTINGS = settings()


def test_settings_named_in_prose_exist() -> None:
    """Every `section.field` in backticks is a setting, if its first word is a section."""
    sections = {name.split(".")[0] for name in SETTINGS}
    wrong = []
    for page in PAGES:
        if page.name in ("REFERENCE.md", "CHANGELOG.md"):
            continue
        for name in re.findall(r"`(\w+\.[a-z_0-9.]+?)(?:=[^`]*|: [^`]*)?`", prose(page)):
            known = any(setting == name or setting.startswith(f"{name}.") for setting in SETTINGS)
            parts = name.split(".")
            if parts[0] in sections and not known and parts[-1] not in ("py", "md", "yaml", "csv"):
                wrong.append(f"{name_of(page)}: {name}")
    assert wrong == []


@pytest.mark.parametrize("command", hooks.commands())
def test_the_tables_list_every_option(command: str) -> None:
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", CliRunner().invoke(app, [command, "--help"]).output))
    parameters = hooks.parameters_of(hooks.commands()[command])
    listed = {name for parameter in parameters if not parameter.is_argument for name in parameter.options}
    # Help texts name options of other commands too.
    assert listed | {"--help"} <= shown
    everywhere = {
        name
        for other in hooks.commands().values()
        for parameter in hooks.parameters_of(other)
        if not parameter.is_argument
        for name in parameter.options
    }
    assert shown <= everywhere | {"--help"}
    table = hooks.options_block(f"halfbyte {command}")
    assert all(f"`{name}" in table for name in listed)


def test_the_page_has_every_command() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    for name in hooks.commands():
        assert f"```options\nhalfbyte {name}\n```" in page
        assert f"## halfbyte {name}\n" in page


def test_the_page_has_every_exit_code() -> None:
    codes = {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    page = (ROOT / "docs" / "commands.md").read_text()
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert listed == codes | {0} | {exit_code(number) for number in STOPPING}
