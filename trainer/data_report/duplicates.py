"""Finds images that are equal or nearly equal, from small thumbnails."""

from collections.abc import Sequence

import numpy
from numpy.typing import NDArray
from PIL import Image

MOST_COMPARED = 20_000
"""With more images only exact copies are found: each pair would have to be compared."""
_NEAR = 5  # of 64 bits


def fingerprint(picture: Image.Image) -> int:
    """Returns 64 bits: for an image of 9 x 8 gray values, whether each is brighter than its right neighbor.

    This is the difference hash (dHash). Scaling, compression and brightness hardly change it.
    """
    values = numpy.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=numpy.int16)
    bits = (values[:, :-1] > values[:, 1:]).flatten()
    return int.from_bytes(numpy.packbits(bits).tobytes(), "big")


def equal_images(digests: NDArray[numpy.bytes_]) -> list[list[int]]:
    """Returns groups of at least two places with the same digest, in the order of their first places."""
    order = numpy.argsort(digests, kind="stable")
    ordered = digests[order]
    starts = numpy.flatnonzero(numpy.r_[True, ordered[1:] != ordered[:-1]])
    ends = numpy.r_[starts[1:], len(ordered)]
    several = numpy.flatnonzero(ends - starts > 1)
    return sorted(order[starts[group] : ends[group]].tolist() for group in several.tolist())


def near_images(fingerprints: Sequence[int], digests: Sequence[object]) -> list[tuple[int, int]]:
    """Returns pairs of places whose images are not equal but look alike."""
    codes = numpy.array(fingerprints, dtype=numpy.uint64)
    pairs = []
    for place in range(len(codes) - 1):
        distance = numpy.bitwise_count(codes[place + 1 :] ^ codes[place])
        for other in (numpy.nonzero(distance <= _NEAR)[0] + place + 1).tolist():
            if digests[place] != digests[other]:
                pairs.append((place, other))
    return pairs
