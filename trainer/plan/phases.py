"""Phases of a run, their memory and work, and the constants they are planned with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from halfbyte.trainer.data.buckets import Size
from halfbyte.trainer.runtime.sizes import GIB, MIB

RECORDED = "cuda graphs: a step's memory"

GATHERED = "cuda graphs: gradients"

# Assumed, and not measured: what a process takes on the device before its first tensor, and what the allocator's blocks
# leave unused between them.
CONTEXT_BYTES = 560 * MIB

SLACK = 0.03

# Measured on an H200 with torch 2.11: what cuBLAS keeps for itself, in torch's own count (of the two threads that call
# it, forward and backward), and Python, torch and diffusers in a process that has loaded nothing
# (scripts/bench/start.py).
PRODUCTS_BYTES = 66 * MIB

# Measured likewise: what the memory of CUDA graphs has between its blocks, 0.6 to 1.3 GiB of FLUX's
# (docs/benchmarks/plan.md).
RECORDED_GAPS = GIB

PROCESS_BYTES = 1100 * MIB

# Measured there: what T5-XXL's and FLUX's shards take of the host while they are read, 2.1 GB with the process (1.0).
READING_BYTES = 1000 * MIB

# Measured there in a first step: what encoding and loading leave, with compiled kernels and the libraries' own; 2.8 GB
# with the process, 2.2 where latents, embeddings and the packed base were found.
STARTED_BYTES = 1600 * MIB

# On an H200 (scripts/bench/train.py): FLUX.1-dev steps at 1024 px ran at 494 to 515 TFLOP/s, recorded, with cuDNN's
# attention; one by one, at 512 px, the processor decides, which gave out some 29,000 operations of a step in 0.365 s.
MEASURED_RATE = 505.0  # TFLOP/s

SECONDS_A_CALL = 12.6e-6

MEASURED_ON = "an H200"

BUS_RATE = 22  # GB/s, about what PCIe 4.0 gives at full width; an H200's virtual machine gave 16 to 20


@dataclass(frozen=True)
class Phase:
    """A part of the run and what it holds at its peak, in bytes by part."""

    name: str
    device: Mapping[str, int]
    host: Mapping[str, int]

    @property
    def allocated(self) -> int:
        """Bytes that tensors take on the device."""
        return sum(self.device.values())

    @property
    def device_bytes(self) -> int:
        """Bytes of the card: with the process's own, and with gaps."""
        return int(self.allocated * (1 + SLACK)) + CONTEXT_BYTES

    @property
    def host_bytes(self) -> int:
        """Bytes of the host's memory."""
        return sum(self.host.values()) + PROCESS_BYTES


@dataclass(frozen=True)
class Work:
    """What takes time: each of the three goes on beside the others."""

    flops: int = 0
    calls: int = 0  # operations that the processor gives out one by one
    copies: int = 0  # bytes that come to the device: streamed blocks, and activations that were put aside

    def seconds(self, rate: float) -> float:
        """Of the slowest of the three; `rate` in TFLOP/s."""
        return max(self.flops / (rate * 1e12), self.calls * SECONDS_A_CALL, self.copies / (BUS_RATE * GIB))


@dataclass(frozen=True)
class RunPlan:
    """All phases of a run, and how long its steps take."""

    phases: Sequence[Phase]
    size: Size  # pixels, the largest of the run
    steps: int
    pictures: int | None  # None: unknown before the pictures are there
    seen: int  # pictures over the whole run, repetitions counted
    step: Work
    draws: int  # pictures that are drawn
    drawing: Work  # of each
    notes: Sequence[str] = field(default=())

    @property
    def largest(self) -> Phase:
        """The phase that decides which card the run fits."""
        return max(self.phases, key=lambda phase: phase.device_bytes)

    def phase(self, name: str) -> Phase:
        """The phase of this name."""
        return next(phase for phase in self.phases if phase.name == name)

    def seconds(self, rate: float) -> tuple[float, float]:
        """Of a step, and of all steps with the drawings, at `rate` TFLOP/s."""
        step = self.step.seconds(rate)
        return step, self.steps * step + self.draws * self.drawing.seconds(rate)
