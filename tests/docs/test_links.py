"""Links between pages resolve, on the site and in the repository."""

from pathlib import Path

import pytest

from doc_pages import GENERATED, PAGES, anchors, links, name_of
from repository import ROOT

DOCS = ROOT / "docs"


def target_of(page: Path, link: str) -> Path:
    """Returns the file that a link names, which may be one that the hooks generate."""
    path = (page.parent / link).resolve() if link else page
    if path.is_relative_to(DOCS) and (source := GENERATED.get(path.relative_to(DOCS).as_posix())):
        return ROOT / source
    return path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    missing = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = target_of(page, path)
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading, `code`\n\n[a](b.md) [c](#a-heading-code)\n```\n[not](a-link)\n```\n")
    assert links(page) == ["b.md", "#a-heading-code"]
    assert anchors(page) == {"a-heading-code"}


def test_every_page_is_linked_from_the_readme() -> None:
    readme = {target_of(ROOT / "README.md", link.partition("#")[0]) for link in links(ROOT / "README.md")}
    overview = {
        target_of(DOCS / "benchmarks" / "index.md", link) for link in links(DOCS / "benchmarks/index.md")
    }
    pages = {page for page in PAGES if page.is_relative_to(DOCS)} - {DOCS / "index.md"}
    assert pages <= readme | overview


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
