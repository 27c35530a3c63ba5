"""Turns the quality benchmark's measurements into means with 95 % intervals, verdicts and a page."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy

from scripts.bench.quality.bases import BF16, NF4, PEER
from scripts.bench.quality.jobs import Trained, Velocities

# Student's t at 0.975 for 1, 2, ... degrees of freedom.
_T = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
_T_BEYOND = 1.96
BAR_PERCENT = 1.0


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its 95 % confidence interval; infinite for a single value."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Returns the interval of independent values, by Student's t."""
        degrees = len(values) - 1
        if degrees == 0:
            return cls(values[0], math.inf)
        t = _T[degrees - 1] if degrees <= len(_T) else _T_BEYOND
        return cls(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values)))

    def show(self, digits: int, sign: str = "") -> str:
        return f"{self.mean:{sign}.{digits}f} ± {self.half:.{digits}f}"


@dataclass(frozen=True)
class TrainedRow:
    """A base over all seeds; differences are between runs of one seed, which share their images and noise."""

    base: str
    seeds: int
    before: float  # validation loss of step 0, mean over the seeds
    after: Interval
    against_bf16: Interval  # percent
    against_peer: Interval | None  # percent; None where the peer was not run
    seconds: float  # mean of a run


@dataclass(frozen=True)
class VelocityRow:
    """The distance of a base's velocity from bf16's without any training, relative to bf16's."""

    base: str
    kept: float  # share of the linear weights that stay in bf16, by a skip list
    loss: float  # the validation loss
    relative: Interval  # over all images and sigmas
    by_sigma: dict[float, Interval]  # over the images


@dataclass(frozen=True)
class Verdict:
    """A target, and whether it was met."""

    bar: str
    found: str
    held: bool


def trained_rows(results: Iterable[Trained]) -> list[TrainedRow]:
    """Returns a row per base, in the order of the results; none without bf16."""
    by_base: dict[str, dict[int, Trained]] = {}
    for result in results:
        by_base.setdefault(result.base, {})[result.seed] = result
    if BF16.name not in by_base:
        return []
    return [
        TrainedRow(
            base,
            len(runs),
            statistics.fmean(run.before for run in runs.values()),
            Interval.of([run.after for run in runs.values()]),
            _against(runs, by_base[BF16.name]),
            _against(runs, by_base[PEER.name]) if PEER.name in by_base else None,
            statistics.fmean(run.seconds for run in runs.values()),
        )
        for base, runs in by_base.items()
    ]


def _against(runs: dict[int, Trained], others: dict[int, Trained]) -> Interval:
    return Interval.of([100 * (run.after / others[seed].after - 1) for seed, run in runs.items()])


def velocity_row(one: Velocities, bf16: Velocities, kept: Mapping[str, float]) -> VelocityRow:
    """Compares a base with bf16."""
    errors = [
        float(numpy.linalg.norm(ours - theirs) / numpy.linalg.norm(theirs))
        for ours, theirs in zip(one.predicted, bf16.predicted, strict=True)
    ]
    levels = sorted(set(one.sigmas))
    by_sigma = {
        level: Interval.of([error for error, sigma in zip(errors, one.sigmas, strict=True) if sigma == level])
        for level in levels
    }
    return VelocityRow(one.base, kept.get(one.base, 0.0), one.loss, Interval.of(errors), by_sigma)


def verdicts(rows: Sequence[TrainedRow]) -> list[Verdict]:
    """Returns the verdicts on default NF4 and on the best improved NF4; none where a base was not trained."""
    by_base = {row.base: row for row in rows}
    if not {BF16.name, NF4.name} <= by_base.keys():
        return []
    nf4 = by_base[NF4.name]
    found = [_within("NF4's", nf4)]
    better = [row for row in rows if row.base.startswith(f"{NF4.name}, ") and row.base != PEER.name]
    if better:
        best = min(better, key=lambda row: row.against_bf16.mean)
        found.append(_within(f"{best.base}:", best))
    if nf4.against_peer is not None:
        worse = nf4.against_peer.mean - nf4.against_peer.half > 0
        shown = f"{nf4.against_peer.show(2, '+')} %"
        found.append(Verdict("NF4 not worse than bitsandbytes' beyond noise", shown, not worse))
    return found


def _within(whose: str, row: TrainedRow) -> Verdict:
    difference = row.against_bf16
    bar = f"{whose} validation loss within {BAR_PERCENT:g} % of bf16's"
    return Verdict(bar, f"{difference.show(2, '+')} %", difference.mean <= BAR_PERCENT)


def page(rows: Sequence[TrainedRow], untrained: Sequence[VelocityRow], bars: Sequence[Verdict]) -> str:
    """Returns the tables in Markdown."""
    lines = [
        "| base | seeds | loss before | loss after | against bf16, % | against bitsandbytes, % | s a run |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        peer = "" if row.against_peer is None else row.against_peer.show(2, "+")
        lines.append(
            f"| {row.base} | {row.seeds} | {row.before:.5f} | {row.after.show(5)} | {row.against_bf16.show(2, '+')}"
            f" | {peer} | {row.seconds:.0f} |"
        )
    levels = list(untrained[0].by_sigma) if untrained else []
    lines += [
        "",
        "| base, untrained | loss | velocity error, % | "
        + " | ".join(f"at {level:g}" for level in levels)
        + " |",
        "| --- | --- | --- |" + " --- |" * len(levels),
    ]
    for one in (row for row in untrained if not row.kept):
        at = " | ".join(_percent(one.by_sigma[level]) for level in levels)
        lines.append(f"| {one.base} | {one.loss:.5f} | {_percent(one.relative)} | {at} |")
    kept = sorted((row for row in untrained if row.kept), key=lambda row: row.relative.mean)
    if kept:
        lines += [
            "",
            "| layers kept, untrained | share of the weights, % | loss | velocity error, % |",
            "| --- | --- | --- | --- |",
        ]
    for one in kept:
        lines.append(f"| {one.base} | {100 * one.kept:.1f} | {one.loss:.5f} | {_percent(one.relative)} |")
    lines += [""]
    lines += [f"- {bar.bar}: {bar.found}: {'held' if bar.held else 'MISSED'}" for bar in bars]
    return "\n".join(lines) + "\n"


def _percent(interval: Interval) -> str:
    return Interval(100 * interval.mean, 100 * interval.half).show(2)
