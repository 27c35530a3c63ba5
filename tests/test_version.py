"""Which halfbyte this is, installed or not."""

import tomllib
from importlib import metadata
from pathlib import Path

from halfbyte.trainer import version
from halfbyte.trainer.version import halfbyte_version

ROOT = Path(__file__).parent.parent


def test_it_is_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert halfbyte_version() == project["version"]


def test_a_source_tree_has_none(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(version, "version", missing)
    assert halfbyte_version() == "not installed"
