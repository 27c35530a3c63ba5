"""Reads the documentation: its pages, their links, headings and code blocks."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from repository import ROOT

_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")])
"""Every Markdown file that users read."""

GENERATED = {
    "recipe-reference.md": "recipes/REFERENCE.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "images/flux-learned.png": "recipes/mini/flux/learned.png",
    "images/sd3-learned.png": "recipes/mini/sd3/learned.png",
}
"""Files that docs/hooks.py adds to docs/, and where they come from."""


def _load_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks its module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


hooks = _load_hooks()
"""docs/hooks.py, which MkDocs loads by its path as well."""


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    page: Path
    line: int  # of its first line of code, counted from 1
    language: str
    code: str
    runs: bool  # marked with <!-- run -->

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    """Returns a page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    """Yields the code blocks of a page; with languages given, only those in one of them."""
    text = page.read_text()
    for match in _FENCE.finditer(text):
        language = match[1].strip()
        if not languages or language in languages:
            runs = text[: match.start()].rstrip().endswith("<!-- run -->")
            yield Block(page, text.count("\n", 0, match.start()) + 2, language, match[2], runs)


def all_blocks(*languages: str) -> list[Block]:
    """Returns the code blocks of every page in one of the languages; "" is a block without one."""
    return [block for page in PAGES for block in blocks(page, *languages)]


def prose(page: Path) -> str:
    """Returns a page without its code blocks."""
    return _FENCE.sub("", page.read_text())


def links(page: Path) -> list[str]:
    """Returns the targets of a page's links and images."""
    return [match[1] for match in _LINK.finditer(prose(page))]


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and MkDocs both form them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        if given := re.search(r"\{ #([\w-]+) \}", heading):
            found.add(given[1])
            continue
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found
