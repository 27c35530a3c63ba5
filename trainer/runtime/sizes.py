"""Formats sizes for people: files and transfers in GB (10^9 bytes), memory in GiB (2^30 bytes)."""

KIB, MIB, GIB = 2**10, 2**20, 2**30
_DECIMAL = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("B", 1))
_BINARY = (("GiB", GIB), ("MiB", MIB), ("KiB", KIB), ("B", 1))


def file_size(nbytes: float) -> str:
    """Formats bytes on a disk or a network, such as `6.4 GB`."""
    return _formatted(nbytes, _DECIMAL, 1)


def memory_size(nbytes: float) -> str:
    """Formats bytes of device or host memory, such as `7.18 GiB`."""
    return _formatted(nbytes, _BINARY, 2)


def decimal_unit(nbytes: float) -> tuple[str, int]:
    """Returns the largest decimal unit that is not larger than `nbytes`: its name and its size in bytes."""
    return next((unit for unit in _DECIMAL if nbytes >= unit[1]), _DECIMAL[-1])


def _formatted(nbytes: float, units: tuple[tuple[str, int], ...], digits: int) -> str:
    name, size = next((unit for unit in units if nbytes >= unit[1]), units[-1])
    return f"{nbytes:.0f} B" if size == 1 else f"{nbytes / size:.{digits}f} {name}"
