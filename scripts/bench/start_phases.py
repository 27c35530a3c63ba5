"""Measures one start of a training run: seconds, host memory and device memory of each phase up to the first step."""

import gc
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

_STATUS = Path("/proc/self/status")
_SAMPLE_SECONDS = 0.05


@dataclass
class Phase:
    """The duration and the peaks of a phase, in GB (10^9 bytes)."""

    name: str
    seconds: float = 0.0
    host_anon: float = 0.0  # the process's own memory, pinned buffers included
    host_file: float = 0.0  # mapped pages, which the system may drop
    device_allocated: float = 0.0
    device_reserved: float = 0.0


@dataclass(frozen=True)
class Start:
    """One start from a fresh process."""

    phases: list[Phase]
    to_first_step: float  # seconds from the start of the interpreter, imports included
    first_loss_finite: bool
    packed_base_bytes: int
    host_peak: float  # GB, by the system's own count of everything resident


class PhaseWatch:
    """Samples this process's memory, and keeps the maximum of each phase."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.phases: list[Phase] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts everything within the context as one phase."""
        now = Phase(name)
        self.phases.append(now)
        _note_memory(now)  # also at both ends, because a phase may end before the thread samples
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        try:
            yield
        finally:
            _note_memory(now)
            if on_gpu:
                torch.cuda.synchronize()
                now.device_allocated = torch.cuda.max_memory_allocated() / 1e9
                now.device_reserved = torch.cuda.max_memory_reserved() / 1e9
            now.seconds = time.perf_counter() - began
            # Printed now, in case a later phase does not end.
            print(
                f"{name}: {now.seconds:.1f} s, {now.device_reserved:.2f} GB reserved",
                file=sys.stderr,
                flush=True,
            )

    def stop(self) -> None:
        """Ends the sampling."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(_SAMPLE_SECONDS):
            if self.phases:
                _note_memory(self.phases[-1])


def _note_memory(phase: Phase) -> None:
    anon, file = resident()
    phase.host_anon = max(phase.host_anon, anon)
    phase.host_file = max(phase.host_file, file)


def resident() -> tuple[float, float]:
    """Returns GB of this process's own memory and of mapped files; (all, 0) where the system does not say."""
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())

    def gigabytes(name: str) -> float:
        return int(fields[name].split()[0]) * 1024 / 1e9 if name in fields else 0.0

    if "RssAnon" not in fields:
        return gigabytes("VmRSS"), 0.0
    return gigabytes("RssAnon") + gigabytes("RssShmem"), gigabytes("RssFile")


class _FirstStep(Exception):
    """Ends the run after the measured step."""


def start(
    recipe_file: Path, overrides: list[str], began: float, *, encode_budget: float | None = None
) -> Start:
    """Runs a recipe to the end of its first optimizer step.

    began: time.perf_counter() at the start. encode_budget: GiB that the allocator may use while encoding.
    """
    watch = PhaseWatch(began)
    with watch.phase("import"):
        # Imported here, because the time of a start includes the import.
        from halfbyte.trainer import run
        from halfbyte.trainer.cli.console import quieten_libraries
        from halfbyte.trainer.denoiser import base as base_module
        from halfbyte.trainer.recipe.load import load_recipe
        from halfbyte.trainer.runtime.world import read_world
        from halfbyte.trainer.training.callbacks import MetricsRecorder

        quieten_libraries()
        gc.freeze()  # as the command does
        recipe = load_recipe(recipe_file, overrides)
        world = read_world()
        if world.device.type == "cuda":
            torch.cuda.init()
    measured: dict[str, Any] = {}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with watch.phase(name):
                return function(*arguments, **options)

        return call

    prepare = run.prepare

    def within_budget(*arguments: Any, **options: Any) -> Any:
        if encode_budget is None or world.device.type != "cuda":
            return prepare(*arguments, **options)
        total = torch.cuda.get_device_properties(world.device).total_memory
        torch.cuda.set_per_process_memory_fraction(encode_budget * 2**30 / total)
        try:
            return prepare(*arguments, **options)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    load = run.load_denoiser

    def load_denoiser(*arguments: Any, **options: Any) -> Any:
        """Loads in two phases: the base, then its adapters and everything else on top of it."""
        read = base_module._read
        with ExitStack() as rest:

            def base(*base_arguments: Any, **base_options: Any) -> Any:
                with watch.phase("transformer"):
                    denoiser = read(*base_arguments, **base_options)
                rest.enter_context(watch.phase("adapters"))
                return denoiser

            with patch.object(base_module, "_read", base):
                loaded = load(*arguments, **options)
        measured["bytes"] = loaded.footprint
        return loaded

    def first_step(recorder: MetricsRecorder, trainer: Any, module: Any) -> None:
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        measured["seconds"] = time.perf_counter() - began
        measured["finite"] = all(bool(p.isfinite().all()) for p in module.parameters() if p.requires_grad)
        raise _FirstStep

    try:
        with (
            patch.object(run, "prepare", watched("encode", within_budget)),
            patch.object(run, "choose_attention", watched("attention", run.choose_attention)),
            patch.object(run, "load_denoiser", load_denoiser),
            patch.object(run, "train", watched("first step", run.train)),
            patch.object(MetricsRecorder, "on_step_end", first_step),
        ):
            run.run(recipe, world, console=Console(soft_wrap=True), resume=False)
    except _FirstStep:
        pass
    finally:
        watch.stop()
    return Start(
        watch.phases,
        measured["seconds"],
        measured["finite"],
        measured["bytes"],
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    )


def as_json(result: Start) -> dict[str, Any]:
    """Returns the start as JSON values, for a file or another process."""
    return asdict(result)
