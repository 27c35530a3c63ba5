"""Which halfbyte this is."""

from importlib.metadata import PackageNotFoundError, version


def halfbyte_version() -> str:
    """The installed version; from a source tree that is not installed there is none to tell."""
    try:
        return version("halfbyte")
    except PackageNotFoundError:
        return "not installed"
