"""Keyed random numbers: each is a function of (seed, purpose, position), so there is no state to save.

`position` counts the samples of the whole run over all ranks. A sample therefore gets the same noise with one process
as with eight, and a resumed run gets the same random numbers as an uninterrupted one.
"""

import hashlib

import torch


def key(seed: int, purpose: str, *position: int) -> int:
    """Returns a 63-bit hash of seed, purpose and position."""
    text = f"{seed}/{purpose}/" + "/".join(map(str, position))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """Returns a generator for one purpose at one position. It is on the CPU, so all devices get the same numbers."""
    return torch.Generator().manual_seed(key(seed, purpose, *position))


def uniform(seed: int, purpose: str, *position: int) -> float:
    """Returns one float, uniformly distributed in [0, 1)."""
    return key(seed, purpose, *position) / 2**63
