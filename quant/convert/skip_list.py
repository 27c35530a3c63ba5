"""A skip list that means given layers and no others, by diffusers' rule for matching names."""

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from halfbyte.quant.convert.replace_linears import is_skipped, linear_layers


@dataclass(frozen=True)
class SkipList:
    """Entries for `skip`, and what they do not say."""

    entries: tuple[str, ...]
    layers: tuple[str, ...]  # what the entries keep out of the quantization
    out_of_reach: dict[
        str, int
    ]  # a wanted layer that no entry means alone -> further layers its path matches


def skip_list_for(model: nn.Module, wanted: Collection[str]) -> SkipList:
    """The shortest list found that skips exactly the `wanted` linear layers of `model`, on meta or not.

    An entry may be a name like `to_q`, a block, or a whole path, as long as it matches wanted layers alone. A
    layer at the top, like FLUX's `proj_out`, may be out of reach: its path is a name that others end in as well.
    """
    paths = [path for path, _ in linear_layers(model)]
    means = {}
    for entry in _entries(wanted):
        matched = frozenset(path for path in paths if is_skipped(path, (entry,)))
        if matched <= set(wanted):
            means[entry] = matched
    left, chosen = set(wanted), []
    while left:
        # The longest reach first; among equals the shortest name.
        best = max(means, key=lambda entry: (len(means[entry] & left), -len(entry), entry), default=None)
        if best is None or not means[best] & left:
            break
        chosen.append(best)
        left -= means[best]
    surplus = {path: sum(is_skipped(other, (path,)) for other in paths) - 1 for path in sorted(left)}
    skipped = tuple(path for path in paths if is_skipped(path, chosen))
    return SkipList(tuple(chosen), skipped, surplus)


def _entries(wanted: Collection[str]) -> set[str]:
    """Every run of whole names in a wanted path, but for those that begin with a number, which says little."""
    entries = set()
    for path in wanted:
        parts = path.split(".")
        for start, first in enumerate(parts):
            if not first.isdigit():
                entries |= {".".join(parts[start:end]) for end in range(start + 1, len(parts) + 1)}
    return entries
