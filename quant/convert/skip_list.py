"""Builds and checks skip lists: the names of layers to leave unquantized, matched by diffusers' rule."""

import difflib
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SkipList:
    """Entries for `skip`, the layers that they match, and the wanted layers that no entry can select."""

    entries: tuple[str, ...]
    layers: tuple[str, ...]  # paths of the layers that the entries leave unquantized
    out_of_reach: dict[str, int]
    """A wanted layer that every entry matches only together with unwanted layers -> how many other layers its
    own path matches."""


def skip_list_for(model: nn.Module, wanted: Collection[str]) -> SkipList:
    """Searches for a short skip list that skips exactly the `wanted` linear layers of `model`.

    An entry is a name like `to_q`, a block, or a whole path, and must match wanted layers only. A top-level
    layer, such as FLUX's `proj_out`, can be out of reach: other layers' paths end in the same name. `model`
    may be on meta.
    """
    paths = [path for path, _ in linear_layers(model)]
    matches = {}
    for entry in _entries(wanted):
        matched = frozenset(path for path in paths if is_skipped(path, (entry,)))
        if matched <= set(wanted):
            matches[entry] = matched
    # Greedy set cover: repeatedly take the entry that matches most of the layers still left.
    left, chosen = set(wanted), []
    while left:
        # Among equals, the shortest entry, then the last one in the alphabet.
        best = max(matches, key=lambda entry: (len(matches[entry] & left), -len(entry), entry), default=None)
        if best is None or not matches[best] & left:
            break
        chosen.append(best)
        left -= matches[best]
    surplus = {path: sum(is_skipped(other, (path,)) for other in paths) - 1 for path in sorted(left)}
    skipped = tuple(path for path in paths if is_skipped(path, chosen))
    return SkipList(tuple(chosen), skipped, surplus)


def _entries(wanted: Collection[str]) -> set[str]:
    """Returns every run of whole names in the wanted paths, except runs that begin with a number."""
    entries = set()
    for path in wanted:
        parts = path.split(".")
        for start, first in enumerate(parts):
            if not first.isdigit():
                entries |= {".".join(parts[start:end]) for end in range(start + 1, len(parts) + 1)}
    return entries


class SkipListError(ValueError):
    """Raised for a skip list that does not fit the model; the message begins with the field, `skip: `."""


@dataclass(frozen=True)
class SkipMatch:
    """The linear layers that one entry of a skip list matches."""

    entry: str
    layers: tuple[str, ...]  # their paths
    parameters: int  # total elements of their weights


def is_skipped(path: str, skip: Sequence[str]) -> bool:
    """Tests whether diffusers' bitsandbytes quantizer would leave the linear layer at `path` unquantized.

    Follows `_replace_with_bnb_linear` (diffusers 0.42) exactly, because an exported list must skip the same
    layers in diffusers. An entry matches the last name of the path, the whole path, or any text in it
    followed by a dot.
    """
    leaf = path.rpartition(".")[2]
    return any(entry in (leaf, path) or f"{entry}." in path for entry in skip)


def kept_in_fp32(model: nn.Module | type[nn.Module]) -> tuple[str, ...]:
    """Returns the modules that the model's class keeps in fp32; diffusers adds them to every skip list."""
    names = getattr(model, "_keep_in_fp32_modules", None) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def skip_matches(model: nn.Module, skip: Sequence[str]) -> tuple[SkipMatch, ...]:
    """Returns the linear layers of `model` that each entry of a skip list matches; `model` may be on meta."""
    linears = dict(linear_layers(model))
    matches = []
    for entry in skip:
        layers = tuple(path for path in linears if is_skipped(path, (entry,)))
        parameters = sum(linears[path].in_features * linears[path].out_features for path in layers)
        matches.append(SkipMatch(entry, layers, parameters))
    return tuple(matches)


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yields every linear layer of a model with its path."""
    # Keep duplicates: a layer with two names has two entries in a checkpoint, and diffusers counts it as two
    # layers.
    for path, module in model.named_modules(remove_duplicate=False):
        if path and isinstance(module, nn.Linear):
            yield path, module


def refuse_unmatched(model: nn.Module, skip: Sequence[str]) -> Sequence[SkipMatch]:
    """Returns the matches of all entries. Raises SkipListError where an entry matches no linear layer."""
    matches = skip_matches(model, skip)
    for match in matches:
        if match.layers:
            continue
        modules = {path for path, _ in model.named_modules()}
        known = modules | {path.rpartition(".")[2] for path in modules}
        near = difflib.get_close_matches(match.entry, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        top_modules = dict.fromkeys(path.partition(".")[0] for path, _ in linear_layers(model))
        raise SkipListError(
            f"skip: got {match.entry!r}, which matches no linear layer of {type(model).__name__}; expected the name or"
            f" path of a layer or of a module that contains layers: {', '.join(top_modules)}, or a module inside"
            f" these{hint}"
        )
    return matches


def check_skip_list(model: nn.Module, skip: Sequence[str]) -> None:
    """Checks a skip list: warns where an entry matches layers outside its module.

    Raises SkipListError where an entry matches no linear layer.
    """
    matches = refuse_unmatched(model, skip)
    model_name = type(model).__name__
    modules = {path for path, _ in model.named_modules()}
    for match in matches:
        # An entry that is a module's full path is meant for that module, but also matches its name elsewhere.
        surplus = [path for path in match.layers if not f"{path}.".startswith(f"{match.entry}.")]
        if match.entry in modules and surplus:
            log.warning(
                "skip: %r matches %d linear layers of %s (%s parameters stay unquantized); %d of them are outside the"
                " module of that path, the first is %s; diffusers matches names anywhere in a path, so no skip list"
                " can select only that module",
                match.entry,
                len(match.layers),
                model_name,
                f"{match.parameters:,}",
                len(surplus),
                surplus[0],
            )
