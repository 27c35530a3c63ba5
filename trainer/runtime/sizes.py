"""Sizes for a reader: files and transfers in GB (10^9 bytes), memory in GiB (2^30 bytes)."""

KIB, MIB, GIB = 2**10, 2**20, 2**30
_DECIMAL = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("B", 1))
_BINARY = (("GiB", GIB), ("MiB", MIB), ("KiB", KIB), ("B", 1))


def file_size(nbytes: float) -> str:
    """Bytes on a disk or a network, as `6.4 GB`."""
    return _formatted(nbytes, _DECIMAL, 1)


def memory_size(nbytes: float) -> str:
    """Bytes of device or host memory, as `7.18 GiB`."""
    return _formatted(nbytes, _BINARY, 2)


def decimal_unit(nbytes: float) -> tuple[str, int]:
    """The largest decimal unit that `nbytes` reaches, with its bytes."""
    return next((unit for unit in _DECIMAL if nbytes >= unit[1]), _DECIMAL[-1])


def _formatted(nbytes: float, units: tuple[tuple[str, int], ...], digits: int) -> str:
    name, size = next((unit for unit in units if nbytes >= unit[1]), units[-1])
    return f"{nbytes:.0f} B" if size == 1 else f"{nbytes / size:.{digits}f} {name}"
