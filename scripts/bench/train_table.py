"""Turns the training benchmark's measurements into a page: seconds, memory, targets, where the time goes."""

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.bench.models import graphs_note
from scripts.bench.trained_model import ROW, Row

# Targets in seconds per step, the first and the current one, by model, px and train.gradient_checkpointing.
ASKED_S: dict[tuple[str, int, str], tuple[float, ...]] = {
    ("flux", 1024, "none"): (0.36, 0.31),
    ("flux", 1024, "selective"): (0.50, 0.42),
    ("flux", 1024, "full"): (0.50, 0.42),
    ("flux", 512, "none"): (0.13,),
    ("flux", 512, "selective"): (0.18,),
    ("flux", 512, "full"): (0.18,),
}
SLOWER = 1.10  # largest allowed time relative to bf16

Result = Mapping[str, Any]


def page(results: Sequence[Result]) -> str:
    """Returns Markdown: the table, the verdicts on our rows, and the profiles where there are any."""
    ordered = _by_size(results)
    parts = [_table(ordered)]
    verdicts = [line for result in ordered for line in _verdicts(result, results)]
    if verdicts:
        parts.append("\n".join(verdicts))
    profiles = [result for result in ordered if "profile_ms" in result]
    if profiles:
        parts.append(f"Where a step goes, ms:\n\n{_profiles(profiles)}")
    return "\n\n".join(parts) + "\n"


def _by_size(results: Sequence[Result]) -> list[Result]:
    """Groups rows of one size and checkpointing, both in the order in which they were first measured."""
    cells = list(dict.fromkeys(_cell(result) for result in results))
    return sorted(results, key=lambda result: cells.index(_cell(result)))


def _cell(result: Result) -> tuple[str, int, str]:
    return result["model"], result["px"], result["checkpoint"]


def _table(results: Sequence[Result]) -> str:
    heads = ["px, checkpointing", "row", "a step (fastest)", "peak", "of bf16", "of peer", "target"]
    lines = [_line(heads), f"|{' --- |' * len(heads)}"]
    for result in results:
        first = [f"{result['px']}, {result['checkpoint']}", _named(result)]
        if not _done(result):
            lines.append(_line([*first, result["state"], *[""] * (len(heads) - 3)]))
            continue
        peak, reserved = result["peak_gib"], "" if result["graphs"] is None else " reserved"
        lines.append(
            _line(
                [
                    *first,
                    f"{result['median_s']:.3f} s ({result['min_s']:.3f})",
                    "" if peak is None else f"{peak:.2f} GiB{reserved}",
                    *(_ratio(result, rival(result, base, results)) for base in ("bf16", "peer")),
                    " then ".join(f"{target:.2f}" for target in _targets(result)),
                ]
            )
        )
    return "\n".join(lines)


def _named(result: Result) -> str:
    """Returns the row's name, and whether it was recorded where it should have been."""
    missing = result.get("graphs") == 0
    return f"{result['row']}: {graphs_note(0)}" if missing else result["row"]


def _done(result: Result) -> bool:
    return bool(result["state"] == "done")


def _row(result: Result) -> Row:
    return ROW[result["row"]]


def rival(result: Result, base: str, results: Sequence[Result]) -> Result | None:
    """Returns the row to compare with: the one over that base that runs in the same way, else the fastest over it.

    None for a row of that base itself, and where none was measured at its size.
    """
    row = _row(result)
    others = [
        other
        for other in results
        if _done(other) and _cell(other) == _cell(result) and _row(other).base == base != row.base
    ]
    alike = [other for other in others if _way(_row(other)) == _way(row)]
    return min(alike or others, key=lambda other: other["median_s"], default=None)


def _way(row: Row) -> tuple[bool, ...]:
    return row.whole, row.compiled, row.graphs


def _ratio(result: Result, other: Result | None) -> str:
    return "" if other is None else f"{result['median_s'] / other['median_s']:.2f} ({other['row']})"


def _targets(result: Result) -> tuple[float, ...]:
    """Returns the target for our fused blocks with all of them on the device."""
    if _row(result).base != "ours" or not _row(result).whole or result["stream"]:
        return ()
    return ASKED_S.get(_cell(result), ())


def _verdicts(result: Result, results: Sequence[Result]) -> list[str]:
    if not _done(result) or _row(result).base != "ours":
        return []
    seconds, targets = result["median_s"], []
    for target in _targets(result):
        targets.append(f"target at most {target:.2f} s, {_verdict(seconds, target)} s")
    bf16 = rival(result, "bf16", results)
    if bf16 is not None:
        ratio = seconds / bf16["median_s"]
        targets.append(
            f"{ratio:.2f} of {bf16['row']}, target at most {SLOWER:.2f}, {_verdict(ratio, SLOWER)}"
        )
    if not targets:
        return []
    return [
        f"- {result['px']} px, {result['checkpoint']}, {result['row']}, {seconds:.3f} s: {'; '.join(targets)}."
    ]


def _verdict(found: float, target: float) -> str:
    return f"{'held' if found <= target else 'missed'} by {abs(target - found):.3f}"


def _profiles(results: Sequence[Result]) -> str:
    kinds = list(dict.fromkeys(kind for result in results for kind in result["profile_ms"]))
    lines = [_line(["px, checkpointing", "row", *kinds]), f"|{' --- |' * (2 + len(kinds))}"]
    for result in results:
        taken = [result["profile_ms"].get(kind) for kind in kinds]
        cells = ["" if ms is None else f"{ms:.1f}" for ms in taken]
        lines.append(_line([f"{result['px']}, {result['checkpoint']}", result["row"], *cells]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
