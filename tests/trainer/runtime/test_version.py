"""Which halfbyte this is, installed or not."""

import tomllib
from importlib import metadata

from halfbyte.trainer.runtime import version
from halfbyte.trainer.runtime.version import halfbyte_version

from repository import ROOT


def test_it_is_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert halfbyte_version() == project["version"]


def test_a_source_tree_has_none(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(version, "version", missing)
    assert halfbyte_version() == "not installed"
