"""The diagram of the packages shows the table of allowed imports."""

import ast
import itertools
import xml.etree.ElementTree as ET
from typing import Any

from repository import ROOT

_SVG = "{http://www.w3.org/2000/svg}"


def directions() -> Any:
    """Returns the table DIRECTIONS of tests/test_layout.py."""
    for node in ast.parse((ROOT / "tests" / "test_layout.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DIRECTIONS":
            return ast.literal_eval(node.value)
    raise AssertionError("tests/test_layout.py has no DIRECTIONS")


def test_the_packages_are_those_of_the_table() -> None:
    tree = ET.parse(ROOT / "docs" / "images" / "packages.svg")
    rows = []
    for group in tree.iter(f"{_SVG}g"):
        units = [text for text in group.iter(f"{_SVG}text") if text.get("class") == "unit"]
        rows.append(tuple(f"{unit.get('data-package')}.{unit.text}" for unit in units))
    assert tuple(rows) == directions()


def test_rows_lie_below_each_other() -> None:
    tree = ET.parse(ROOT / "docs" / "images" / "packages.svg")
    heights = [
        [float(text.get("y", 0)) for text in group.iter(f"{_SVG}text") if text.get("class") == "unit"]
        for group in tree.iter(f"{_SVG}g")
    ]
    assert all(max(above) < min(below) for above, below in itertools.pairwise(heights))


def test_diagrams_name_themselves() -> None:
    for name in ("packages.svg", "step.svg"):
        title = ET.parse(ROOT / "docs" / "images" / name).find(f"{_SVG}title")
        assert title is not None
        assert title.text
