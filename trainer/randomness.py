"""Keyed randomness: every draw is a function of (seed, purpose, position), so there is no state to save.

`position` counts the samples of the whole run over all ranks, so a sample gets the same noise whether one
process trains or eight, and a resumed run draws what the uninterrupted one would have drawn.
"""

import hashlib

import torch


def key(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit integer that any change of seed, purpose or position changes."""
    text = f"{seed}/{purpose}/" + "/".join(map(str, position))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, purpose: str, *position: int) -> torch.Generator:
    """A CPU generator for one purpose at one position; CPU, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(key(seed, purpose, *position))


def uniform(seed: int, purpose: str, *position: int) -> float:
    """One float in [0, 1)."""
    return key(seed, purpose, *position) / 2**63
