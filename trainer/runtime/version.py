"""Reads the version of the installed halfbyte package."""

from importlib.metadata import PackageNotFoundError, version


def halfbyte_version() -> str:
    """Returns the installed version, or "not installed" for a source tree that is not installed."""
    try:
        return version("halfbyte")
    except PackageNotFoundError:
        return "not installed"
