"""The packaging rules: import directions, no cycles, folder sizes, and nothing that shadows another package."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from repository import ROOT
from slow_tests import SLOW

# The allowed import directions, highest first. A unit (a package or a file) may import every row below its own and
# nothing in its own row or above. `halfbyte.trainer.cli` is imported by its own entry point only.
DIRECTIONS = (
    ("trainer.__main__",),
    ("trainer.cli",),
    ("trainer.run", "trainer.data_report"),
    ("trainer.quantize", "trainer.plan"),
    ("trainer.training", "trainer.publish"),
    ("trainer.sample", "trainer.export"),
    ("trainer.cuda_graphs", "trainer.denoiser"),
    ("trainer.data", "trainer.run_folder"),
    ("trainer.recipe",),
    ("trainer.optim",),
    ("trainer.families", "trainer.adapters"),
    ("trainer.pretrained", "trainer.objective"),
    ("trainer.runtime", "trainer.hub", "trainer.registry"),
    ("trainer.randomness", "trainer.wording", "trainer.errors"),
    ("quant.stock",),
    ("quant.load",),
    ("quant.convert",),
    ("quant.lora",),
    ("quant.layers",),
    ("quant.formats", "quant.files"),
    (
        "kernels.adamw_8bit",
        "kernels.attention",
        "kernels.copy_rows",
        "kernels.gelu",
        "kernels.linear_4bit",
        "kernels.modulation",
        "kernels.qk_rope",
        "kernels.stacked",
    ),
    ("kernels.quantize_4bit", "kernels.int8"),
    ("kernels.row_chunks",),
    (
        "kernels.rows",
        "kernels.dispatch",
        "kernels.triton_launch",
        "kernels.precision",
        "kernels.fp32_product",
    ),
)
ROW = {unit: number for number, row in enumerate(DIRECTIONS) for unit in row}
SOURCES = [
    file
    for top in ("kernels", "quant", "trainer")
    for file in sorted((ROOT / top).rglob("*.py"))
    if "__pycache__" not in file.parts
]


def module_of(file: Path) -> str:
    """Returns the dotted name below `halfbyte`, for example `trainer.data.cache`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in SOURCES}


def package_of(module: str) -> str:
    """Returns the folder of a module. A file directly in `trainer` or `kernels` is a separate unit."""
    return module if module.count(".") < 2 else module.rpartition(".")[0]


def unit_of(module: str) -> str:
    """Returns the row entry of a module: its first two names."""
    return ".".join(module.split(".")[:2])


def imports_of(file: Path) -> Iterator[tuple[int, str]]:
    """Yields line and module of every import of ours, in functions and under TYPE_CHECKING as well."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            base = node.module or ""
            inner = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("halfbyte.") in MODULES else base for name in inner]
        else:
            continue
        for name in dict.fromkeys(names):
            assert name.split(".")[0] not in ("kernels", "quant", "trainer", "scripts"), (
                f"{file}:{node.lineno}: {name}"
            )
            if name.startswith("halfbyte."):
                yield node.lineno, name.removeprefix("halfbyte.")


@cache
def all_imports() -> dict[str, list[str]]:
    """Returns our imports of every module. Not at import: every test process imports this file."""
    return {module: [name for _, name in imports_of(file)] for module, file in MODULES.items()}


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """Returns the nodes of one cycle; empty where there is none."""
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(node: str) -> list[str]:
        state[node] = 1
        path.append(node)
        for other in sorted(graph.get(node, ())):
            if state.get(other) == 1:
                return path[path.index(other) :]
            if other not in state and (found := visit(other)):
                return found
        path.pop()
        state[node] = 2
        return []

    for node in sorted(graph):
        if node not in state and (found := visit(node)):
            return found
    return []


def test_every_unit_is_in_the_table() -> None:
    assert {unit_of(module) for module in MODULES} == set(ROW)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    unit = unit_of(module)
    for line, name in imports_of(MODULES[module]):
        other = unit_of(name)
        assert other in ROW, f"{MODULES[module]}:{line}: {name} is not in the table"
        assert other == unit or ROW[other] > ROW[unit], (
            f"{MODULES[module]}:{line}: {unit} may not import {other}"
        )


def test_there_is_no_cycle_of_files() -> None:
    graph = {module: {name for name in names if name in MODULES} for module, names in all_imports().items()}
    assert cycle_in(graph) == []


def test_there_is_no_cycle_of_packages() -> None:
    graph: dict[str, set[str]] = {}
    for module, names in all_imports().items():
        package = package_of(module)
        others = {package_of(name) for name in names if name in MODULES}
        graph.setdefault(package, set()).update(others - {package})
    assert cycle_in(graph) == []


def test_the_checks_see_a_cycle_and_an_upward_import() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c"]
    assert ROW["trainer.run"] < ROW["trainer.recipe"] < ROW["quant.load"] < ROW["kernels.rows"]


def test_folders_stay_small() -> None:
    for top in ("kernels", "quant", "trainer", "scripts"):
        for folder in (ROOT / top, *(ROOT / top).rglob("*/")):
            assert len(list(folder.glob("*.py"))) <= 15, folder
    shown = [
        entry for entry in (ROOT / "trainer").iterdir() if not entry.name.startswith((".", "__pycache__"))
    ]
    assert sum(entry.is_file() for entry in shown) <= 8
    assert sum(entry.is_dir() for entry in shown) <= 24


def test_our_kernels_folder_does_not_shadow_the_kernels_package(tmp_path: Path) -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("REAL = True")
    # The repository comes first on the path, as with `python -m` and pytest's rootdir.
    code = f"import sys; sys.path = [{str(ROOT)!r}, {str(tmp_path)!r}]; import kernels; assert kernels.REAL"
    subprocess.run([sys.executable, "-S", "-c", code], check=True)


def test_every_folder_with_python_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"halfbyte." + ".".join(file.parent.relative_to(ROOT).parts) for file in SOURCES}
    assert found <= set(settings["packages"])
    assert set(settings["package-dir"]) == {
        f"halfbyte.{name}" for name in ("kernels", "quant", "trainer", "recipes")
    }


def test_the_list_of_slow_tests_is_up_to_date() -> None:
    for entry in SLOW:
        path, _, name = entry.partition("::")
        name = name.rpartition("::")[2]  # without its class
        files = list(ROOT.glob(f"{path}*")) if not path.endswith("/") else list(ROOT.glob(f"{path}test_*.py"))
        files = files or list(ROOT.glob(f"{path}**/test_*.py"))
        assert files, entry
        assert all(f"def {name}" in file.read_text() for file in files if name), entry
