"""The packaging rules: nothing shadows Hugging Face's `kernels`, every folder is installed, imports point down."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "quant", "trainer")  # lowest first
SOURCES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            names.add(node.module or "")
    return names


def test_our_kernels_folder_does_not_shadow_the_kernels_package(tmp_path):
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("REAL = True")
    # The repository first on the path, as `python -m` and pytest's rootdir put it.
    code = f"import sys; sys.path = [{str(ROOT)!r}, {str(tmp_path)!r}]; import kernels; assert kernels.REAL"
    subprocess.run([sys.executable, "-S", "-c", code], check=True)


def test_every_folder_with_python_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = set(settings["packages"])
    found = {
        "halfbyte." + ".".join(file.parent.relative_to(ROOT).parts)
        for file in SOURCES
        if "__pycache__" not in file.parts
    }
    assert found <= listed
    assert set(settings["package-dir"]) == {f"halfbyte.{name}" for name in (*PACKAGES, "recipes")}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file):
    layer = PACKAGES.index(file.relative_to(ROOT).parts[0])
    allowed = tuple(f"halfbyte.{name}" for name in PACKAGES[: layer + 1])
    ours = {name for name in imported(file) if name.split(".")[0] in ("halfbyte", *PACKAGES)}
    assert all(name.startswith(allowed) for name in ours), ours
