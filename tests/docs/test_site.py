"""The site builds without a warning and needs no network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from doc_pages import hooks
from repository import ROOT

_LOADED = re.compile(r'<(?:script|img|source|iframe)[^>]*\ssrc="([^"]+)"|<link[^>]*\shref="([^"]+)"')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout + done.stderr == ""
    return folder


@pytest.mark.slow
def test_no_page_loads_anything_from_the_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = [one or other for one, other in _LOADED.findall(page.read_text())]
        assert loaded
        assert [address for address in loaded if re.match(r"(https?:)?//", address)] == [], page.name


@pytest.mark.slow
def test_generated_blocks_are_filled_in(site: Path) -> None:
    text = {page.name: page.read_text() for page in site.rglob("*.html")}
    assert "quant.double_quant" not in text["commands.html"]
    assert "<td><code>--fit TEXT</code></td>" in text["commands.html"]
    assert "class</span>" in text["optimizer.html"]
    assert "flux_lora.yaml" in text["train.html"]
    assert 'id="lora"' in text["recipe-reference.html"]
    assert (site / "images" / "flux-learned.png").stat().st_size > 10_000


def test_a_missing_definition_is_an_error() -> None:
    with pytest.raises(KeyError, match="Nowhere"):
        hooks.definition(ROOT / "trainer" / "registry.py", "Registry.Nowhere")
    assert hooks.definition(ROOT / "trainer" / "errors.py", "DataError.exit_code") == "exit_code = 3"


def test_links_out_of_the_site_become_text() -> None:
    page = "[a](docs/train.md#start) [b](pyproject.toml) [c](CHANGELOG.md) [d](https://e.org) [e](#f)"
    assert hooks.relinked(page) == "[a](train.md#start) b [c](changelog.md) [d](https://e.org) [e](#f)"
