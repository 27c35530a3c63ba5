"""Tests the reported version, installed or not."""

import tomllib
from importlib import metadata

from halfbyte.trainer.runtime import version
from halfbyte.trainer.runtime.version import halfbyte_version

from repository import ROOT


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert halfbyte_version() == project["version"]


def test_a_source_tree_has_no_version(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(version, "version", missing)
    assert halfbyte_version() == "not installed"
