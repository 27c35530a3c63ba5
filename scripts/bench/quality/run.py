"""Measures the quality cost of 4 bits: LoRA over each kind of base, by the held-out loss at fixed noise.

    python -m scripts.bench.quality.run --seeds 8 --processes 12 --json quality.json

Every run trains the recipe's model on its images (`recipes/flux_mini.yaml`, unless another recipe is named;
settings can be overridden as on train's command line). A seed sets the adapter's start, the order of the
images and all noise, so runs of one seed differ only in their base: differences are taken within a seed, and
the intervals are Student's 95 % over the seeds. bf16 is the unquantized base; `bitsandbytes + PEFT` is what a
user would run instead, and needs bitsandbytes.

The benchmark also measures how far each base's velocity is from bf16's before any training, by noise level;
the same with one kind of layer at a time kept in bf16; and whole runs that keep the layers which quant-report
ranks worst.

A step of a small model waits for its launches, so a GPU can serve several processes in parallel.
"""

import argparse
import json
import multiprocessing
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from halfbyte.quant.convert.skip_list import skip_list_for
from halfbyte.quant.load.transformer import empty_model
from halfbyte.trainer.data.prepare import prepare
from halfbyte.trainer.quantize.report import kind_of, quant_report
from halfbyte.trainer.recipe.recipe import Recipe
from scripts.bench.quality.bases import BF16, CALIBRATED, EXACT, NF4, STARTED, STORED, Base, keeping
from scripts.bench.quality.jobs import (
    Bench,
    Trained,
    Velocities,
    calibrate,
    opened,
    start_process,
    train,
    velocities,
)
from scripts.bench.quality.table import page, trained_rows, velocity_row, verdicts

RECIPE = Path(__file__).parents[3] / "recipes" / "flux_mini.yaml"


@dataclass(frozen=True)
class Skips:
    """NF4 bases that keep layers in bf16."""

    kinds: list[Base]  # one per kind of layer, which is a path without its block numbers
    worst: Base  # the layers that quant-report ranks first


def skips_of(bench: Bench, worst: float) -> Skips:
    """Returns what can be kept of the recipe's model; `worst` is the share of all layers that the last one keeps."""
    recipe = bench.settings(NF4)
    _, family = opened(recipe)
    report = quant_report(family.source.folder, "transformer", device=torch.device("cpu"))
    model = empty_model(family.denoiser_class, family.denoiser_config, family.source.folder / "transformer")
    size = {layer.name: layer.parameters / report.total.parameters for layer in report.layers}

    def kept(name: str, wanted: list[str]) -> Base:
        found = skip_list_for(model, wanted)
        return keeping(name, found.entries, sum(size[layer] for layer in found.layers))

    kinds = [kept(kind.name, [name for name in size if kind_of(name) == kind.name]) for kind in report.kinds]
    ranked = [layer.name for layer in report.layers[: max(1, round(worst * len(report.layers)))]]
    # Skip lists cannot name every kind, for example not FLUX's last layer.
    return Skips([kind for kind in kinds if kind.kept], kept(f"the {len(ranked)} worst layers", ranked))


class Here(Executor):
    """An executor that runs jobs at once, in this process."""

    def submit(self, work: Any, /, *arguments: Any, **settings: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*arguments, **settings))  # an exception ends the benchmark with its traceback
        return future


def executor(processes: int) -> Executor:
    """Returns an executor with so many processes; with 0 it runs everything in this process."""
    if not processes:
        return Here()
    # Spawned, because a process that has used CUDA cannot be forked.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=context, initializer=start_process)


class Results:
    """The results so far, written whenever a run ends."""

    def __init__(
        self, arguments: argparse.Namespace, recipe: Recipe, device: str, kept: Mapping[str, float]
    ) -> None:
        self.arguments = arguments
        self.recipe = recipe
        self.device = device
        self.kept = kept
        self.began = time.perf_counter()
        self.bases: list[Base] = []  # in the order in which they are shown
        self.predicted: list[Velocities] = []
        self.trained: list[Trained] = []
        self.failed: dict[str, str] = {}  # bases that have no row, and why

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def succeeded(self, base: Base, job: Future[Any]) -> bool:
        """Returns True if an ended job gave a result; prints a failure, which affects only its own base."""
        error = job.exception()
        if error is None:
            return True
        if base.name not in self.failed:
            self.failed[base.name] = f"{type(error).__name__}: {error}"
            print(f"{base.name} failed: {self.failed[base.name]}", flush=True)
        return False

    def add(self, result: Trained, of: int) -> None:
        """Prints and keeps a run."""
        self.trained.append(result)
        print(
            f"{len(self.trained)}/{of} {result.base}, seed {result.seed}: {result.before:.5f} -> {result.after:.5f}"
            f" in {result.seconds:.0f} s",
            flush=True,
        )
        self.write()

    def write(self) -> str:
        """Writes the files and returns the page. A seed counts once every base has been trained with it."""
        names = [base.name for base in self.bases if base.name not in self.failed]
        runs = sorted(
            (run for run in self.trained if run.base in names),
            key=lambda run: (names.index(run.base), run.seed),
        )
        seeds = Counter(run.seed for run in runs)
        rows = trained_rows(run for run in runs if seeds[run.seed] == len(names))
        untrained = [velocity_row(one, self.predicted[0], self.kept) for one in self.predicted[1:]]
        bars = verdicts(rows)
        text = page(rows, untrained, bars)
        if self.arguments.markdown:
            self.arguments.markdown.write_text(text)
        if self.arguments.json:
            content = {
                "device": self.device,
                "torch": torch.__version__,
                "seconds": self.seconds,
                "recipe": self.recipe.dump(),
                "bars": [asdict(bar) for bar in bars],
                "trained": [asdict(row) for row in rows],
                "untrained": [asdict(row) for row in untrained],
                "runs": [asdict(run) for run in runs],
                "failed": self.failed,
            }
            self.arguments.json.write_text(json.dumps(content, indent=1, default=str) + "\n")
        return text


def measure(bench: Bench, bases: Sequence[Base], skips: Skips, results: Results) -> None:
    """Runs every job; after `--seconds` no further job starts."""
    arguments = results.arguments
    untrained = [base for base in bases if "kaiming" not in base.name]
    untrained += skips.kinds if arguments.kinds else []
    with executor(arguments.processes) as pool:
        # The first run has the device to itself, so that later runs find its results about the device.
        first = pool.submit(train, bench, bases[0], 0)
        predicting = [(base, pool.submit(velocities, bench, base)) for base in untrained]
        results.predicted = [job.result() for base, job in predicting if results.succeeded(base, job)]
        small = [kind for kind in skips.kinds if kind.kept <= arguments.worst]
        results.bases = [*bases, *best(small, results.predicted, arguments.kinds)]
        first.exception()
        jobs = [(base, seed) for seed in range(arguments.seeds) for base in results.bases]
        training = {first: bases[0]} | {pool.submit(train, bench, *job): job[0] for job in jobs[1:]}
        for done in as_completed(training):
            if not done.cancelled() and results.succeeded(training[done], done):
                results.add(done.result(), len(training))
            if arguments.seconds and results.seconds > arguments.seconds:
                for future in training:
                    future.cancel()


def best(kinds: Sequence[Base], predicted: Sequence[Velocities], count: int) -> list[Base]:
    """Returns the kinds of layer that, in bf16, bring the untrained velocity closest to the bf16 model's."""
    bf16 = predicted[0]
    errors = {one.base: velocity_row(one, bf16, {}).relative.mean for one in predicted[1:]}
    return sorted((kind for kind in kinds if kind.name in errors), key=lambda kind: errors[kind.name])[:count]


def main() -> None:
    """Measures, prints the tables, and writes them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="settings of the recipe by dotted name")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--processes", type=int, default=0, help="number of parallel processes; 0: run in this one"
    )
    parser.add_argument("--seconds", type=float, help="time limit; no further run starts after it")
    parser.add_argument("--only", help="bases to train on, by name, separated by semicolons")
    parser.add_argument(
        "--kinds", type=int, default=2, help="number of layer kinds to keep in bf16 in runs; 0: none"
    )
    parser.add_argument(
        "--worst",
        type=float,
        default=0.1,
        help="share of layers to keep in bf16 in a run",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=256,
        help="number of samples of the recipe's images for calibrated bases",
    )
    parser.add_argument("--json", type=Path, help="write every measurement and row to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    arguments = parser.parse_args()
    start_process()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(arguments.recipe, arguments.overrides, Path(scratch))
        recipe = bench.settings(BF16)
        if not recipe.validation.wanted:
            parser.error(
                "the recipe has no held-out images; add validation.held_out=N or validation.path=FOLDER"
            )
        world, family = opened(recipe)
        prepare(recipe, family, world, Console(quiet=True))  # so that the processes find a full cache
        skips = skips_of(bench, arguments.worst)
        bases = [*STORED, *CALIBRATED, *EXACT, *STARTED, skips.worst]
        if arguments.only:
            names = {BF16.name, NF4.name, *arguments.only.split(";")}
            if unknown := names - {base.name for base in bases}:
                parser.error(f"--only: no {sorted(unknown)}; there are {[base.name for base in bases]}")
            bases = [base for base in bases if base.name in names]
        for base in bases:
            if base.calibrated:
                calibrate(bench, base, arguments.samples)
        device = torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor()
        kept = {base.name: base.kept for base in [*skips.kinds, skips.worst]}
        results = Results(arguments, recipe, device, kept)
        measure(bench, bases, skips, results)
    print(f"\n{results.write()}\n{len(results.trained)} runs in {results.seconds:.0f} s")
    if results.failed:
        raise SystemExit(f"no row for {results.failed}")


if __name__ == "__main__":
    main()
