"""A skip list that means given layers and no others, by diffusers' rule for matching names."""

import difflib
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

log = logging.getLogger(__name__)


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


class SkipListError(ValueError):
    """A skip list that does not fit the model; the message begins with the field, `skip: `."""


@dataclass(frozen=True)
class SkipMatch:
    """What one entry of a skip list keeps out of the quantization."""

    entry: str
    layers: tuple[str, ...]  # paths of linear layers
    parameters: int  # elements of their weights


def is_skipped(path: str, skip: Sequence[str]) -> bool:
    """Whether diffusers' bitsandbytes quantizer would leave the linear layer at `path` alone.

    The rule of `_replace_with_bnb_linear` (diffusers 0.42), to the letter, so that an exported list means the
    same layers there: an entry matches the leaf name, the whole path, or, with a dot after it, any piece of it.
    """
    leaf = path.rpartition(".")[2]
    return any(entry in (leaf, path) or f"{entry}." in path for entry in skip)


def kept_in_fp32(model: nn.Module | type[nn.Module]) -> tuple[str, ...]:
    """Names that the model's class keeps in fp32; diffusers adds them to every skip list."""
    names = getattr(model, "_keep_in_fp32_modules", None) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def skip_matches(model: nn.Module, skip: Sequence[str]) -> tuple[SkipMatch, ...]:
    """For each entry of a skip list, the linear layers it matches in `model`, on meta or not."""
    linears = dict(linear_layers(model))
    matches = []
    for entry in skip:
        layers = tuple(path for path in linears if is_skipped(path, (entry,)))
        parameters = sum(linears[path].in_features * linears[path].out_features for path in layers)
        matches.append(SkipMatch(entry, layers, parameters))
    return tuple(matches)


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear layer of a model with its path."""
    # Duplicates included: a layer under two names is two entries of a checkpoint, and two layers to diffusers.
    for path, module in model.named_modules(remove_duplicate=False):
        if path and isinstance(module, nn.Linear):
            yield path, module


def refuse_unmatched(model: nn.Module, skip: Sequence[str]) -> Sequence[SkipMatch]:
    """What the entries match. Raises SkipListError where one matches no linear layer."""
    matches = skip_matches(model, skip)
    for match in matches:
        if match.layers:
            continue
        modules = {path for path, _ in model.named_modules()}
        known = modules | {path.rpartition(".")[2] for path in modules}
        near = difflib.get_close_matches(match.entry, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        holders = dict.fromkeys(path.partition(".")[0] for path, _ in linear_layers(model))
        raise SkipListError(
            f"skip: got {match.entry!r}, which matches no linear layer of {type(model).__name__}; expected names or"
            f" paths of layers, or of modules that hold some: {', '.join(holders)} or what is inside of them{hint}"
        )
    return matches


def check_skip_list(model: nn.Module, skip: Sequence[str]) -> None:
    """As `refuse_unmatched`; warns where an entry matches more than it seems to say."""
    matches = refuse_unmatched(model, skip)
    model_name = type(model).__name__
    modules = {path for path, _ in model.named_modules()}
    for match in matches:
        # Whoever names a module by its full path means that module, and gets every layer of the name.
        surplus = [path for path in match.layers if not f"{path}.".startswith(f"{match.entry}.")]
        if match.entry in modules and surplus:
            log.warning(
                "skip: %r matches %d linear layers of %s (%s parameters stay unquantized), of them %d besides"
                " the module of that path, %s first; diffusers matches names anywhere in a path, so no list can"
                " mean that module alone",
                match.entry,
                len(match.layers),
                model_name,
                f"{match.parameters:,}",
                len(surplus),
                surplus[0],
            )
