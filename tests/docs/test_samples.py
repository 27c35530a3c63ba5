"""Code samples compile, those marked to run do, recipes validate, and source blocks name real definitions."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.trainer.families.family import Family
from halfbyte.trainer.objective import losses, shift, timesteps, weighting
from halfbyte.trainer.optim import optimizers, schedules
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.registry import Registry

from doc_pages import PAGES, Block, all_blocks, blocks, hooks, name_of, prose
from repository import ROOT

RUNNING = [page for page in PAGES if any(block.runs for block in blocks(page, "python"))]


@pytest.mark.parametrize("block", all_blocks("python"), ids=str)
def test_python_compiles(block: Block) -> None:
    compile(block.code, str(block), "exec")


def test_the_guides_run() -> None:
    assert {page.stem for page in RUNNING} >= {"family", "optimizer", "kernel", "stock", "bitsandbytes-guide"}


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING, ids=name_of)
def test_python_runs(page: Path, tmp_path: Path) -> None:
    """Runs the marked blocks of a page one after another, as a reader would, in a process of their own.

    With -P it is a fork of one that has imported the libraries, but nothing of halfbyte; see `fork_server`.
    """
    program = tmp_path / "page.py"
    # Line numbers in a traceback are those of the page.
    lines: list[str] = []
    for block in blocks(page, "python"):
        if block.runs:
            lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
    program.write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, "-P", str(program)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{name_of(page)}:\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=str)
def test_recipes_validate(block: Block, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(block.code)
    assert load_recipe(recipe, pictures_needed=False).train.steps > 0


@pytest.mark.parametrize("block", all_blocks("source", "options", "recipes"), ids=str)
def test_generated_blocks_are_current(block: Block) -> None:
    assert hooks.GENERATORS[block.language](block.code.strip())


def test_files_named_in_prose_exist() -> None:
    """Every path in backticks that starts with a folder of the repository is a file or a folder."""
    tops = ("trainer", "quant", "kernels", "scripts", "tests", "recipes", "docs")
    missing = []
    for page in PAGES:
        if page.name == "CHANGELOG.md" or "benchmarks" in page.parts:
            continue
        for path in re.findall(rf"`((?:{'|'.join(tops)})/[\w./*-]*)`", prose(page)):
            if not (ROOT / path).exists() and not list(ROOT.glob(path)) and "silu" not in path:
                missing.append(f"{name_of(page)}: {path}")
    assert missing == []


def test_the_family_page_names_what_a_family_must_have() -> None:
    page = (ROOT / "docs" / "extend" / "family.md").read_text()
    for name in Family.__abstractmethods__:
        assert f"`{name}`" in page


def test_the_optimizer_page_lists_every_registry() -> None:
    page = (ROOT / "docs" / "extend" / "optimizer.md").read_text()
    for module in (losses, shift, timesteps, weighting, optimizers, schedules):
        own = [
            name
            for name, value in vars(module).items()
            if isinstance(value, Registry) and f"{name}: " in Path(module.__file__ or "").read_text()
        ]
        assert len(own) == 1
        file = Path(module.__file__ or "").relative_to(ROOT).as_posix()
        assert f"| `{own[0]}` | `{file}` |" in page
