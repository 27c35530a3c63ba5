"""Measures what hostile input costs, for the report of `scripts/soak`."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from soak import is_reported, report

# Files whose tests each give a reader something hostile, and how the report calls it.
HOSTILE = {
    "test_adapters.py": "adapters",
    "test_captions.py": "captions",
    "test_encoders.py": "text encoders and VAEs",
    "test_hostile_data.py": "data sets",
    "test_hostile_recipes.py": "recipes",
    "test_model_folders.py": "model folders",
    "test_patterns.py": "patterns",
    "test_pictures.py": "images",
    "test_tokenizers.py": "tokenizers",
}
SECONDS, BYTES = 10, 10**9  # the most that an input may take


@pytest.fixture(autouse=True)
def cost(request: pytest.FixtureRequest) -> Iterator[None]:
    kind = HOSTILE.get(request.path.name)
    if kind is None or not is_reported():
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is in use now
    began, before = time.monotonic(), _memory("VmRSS")
    yield
    slow = time.monotonic() - began > SECONDS
    large = _memory("VmHWM") - before > BYTES
    report(f"hostile {kind}", tried=1, above_10_seconds=slow, above_1_GB_of_memory=large)


def _memory(field: str) -> int:
    """Returns the bytes of memory of this process, from one of the fields of its status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field}")
