"""The phases of a run with their memory and work, and the measured constants that plans are made with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from halfbyte.trainer.data.views.buckets import Size
from halfbyte.trainer.runtime.sizes import GIB, MIB

RECORDED = "cuda graphs: a step's memory"

GATHERED = "cuda graphs: gradients"

# Both assumed, not measured: the device memory of a process before its first tensor, and the share of memory
# that the allocator leaves unused between its blocks.
CONTEXT_BYTES = 560 * MIB

SLACK = 0.03

# Measured on an H200 with torch 2.11 (scripts/bench/start.py): cuBLAS's workspaces as torch counts them, one
# for each of the two threads that call cuBLAS, in the forward and in the backward.
PRODUCTS_BYTES = 66 * MIB

# Measured on the same machine: unused memory between the blocks of a CUDA graph's pool, 0.6 to 1.3 GiB for
# FLUX (docs/benchmarks/plan.md).
RECORDED_GAPS = GIB

# Measured by the same script: host memory of Python, torch and diffusers in a process that has loaded
# nothing.
PROCESS_BYTES = 1100 * MIB

# Measured by the same script: host memory while the shards of T5-XXL and FLUX are read, 2.1 GB including the
# process itself (1.0).
READING_BYTES = 1000 * MIB

# Measured by the same script in a first step: host memory that encoding and loading leave behind, with
# compiled kernels and the libraries' own memory. 2.8 GB including the process; 2.2 if latents, embeddings and
# the packed base were cached.
STARTED_BYTES = 1600 * MIB

# Measured on an H200 (scripts/bench/train.py). With CUDA graphs and cuDNN's attention, FLUX.1-dev steps at
# 1024 px ran at 494 to 515 TFLOP/s. Without graphs, at 512 px, the CPU is the limit: it launched the roughly
# 29,000 operations of a step in 0.365 s.
MEASURED_RATE = 505.0  # TFLOP/s

SECONDS_A_CALL = 12.6e-6  # per operation that the CPU launches

MEASURED_ON = "an H200"

# GiB/s, about what a full-width PCIe 4.0 bus gives; 16 to 20 GB/s were measured in a VM with an H200.
BUS_RATE = 22


@dataclass(frozen=True)
class Phase:
    """A phase of the run and its memory at the phase's peak, in bytes by part."""

    name: str
    device: Mapping[str, int]
    host: Mapping[str, int]

    @property
    def allocated(self) -> int:
        """Bytes of the tensors on the device."""
        return sum(self.device.values())

    @property
    def device_bytes(self) -> int:
        """Bytes of the device, including the CUDA context and the allocator's gaps."""
        return int(self.allocated * (1 + SLACK)) + CONTEXT_BYTES

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory, including the process itself."""
        return sum(self.host.values()) + PROCESS_BYTES


@dataclass(frozen=True)
class Work:
    """The work that takes time: computing, launching operations and copying, which all overlap."""

    flops: int = 0
    calls: int = 0  # operations that the CPU launches one by one
    copies: int = 0  # bytes copied to the device: streamed blocks and offloaded activations

    def seconds(self, rate: float) -> float:
        """Returns the time of the slowest of the three; `rate` is in TFLOP/s."""
        return max(self.flops / (rate * 1e12), self.calls * SECONDS_A_CALL, self.copies / (BUS_RATE * GIB))


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run: all of its phases, and the work of its steps."""

    phases: Sequence[Phase]
    size: Size  # pixels, the largest of the run
    steps: int
    pictures: int | None  # training images; None if an image folder does not exist yet
    epoch: int | None  # samples in an epoch; differs from `pictures` with repeats or several resolutions
    seen: int  # images over the whole run, counting repetitions
    step: Work
    draws: int  # sample images that are generated
    drawing: Work  # the work of each sample image
    texts: int | None = None  # different captions and prompts to encode; None if unknown
    notes: Sequence[str] = field(default=())

    @property
    def largest(self) -> Phase:
        """The phase with the most device memory, which decides the card that the run needs."""
        return max(self.phases, key=lambda phase: phase.device_bytes)

    def phase(self, name: str) -> Phase:
        """Returns the phase called `name`."""
        return next(phase for phase in self.phases if phase.name == name)

    def seconds(self, rate: float) -> tuple[float, float]:
        """Returns the seconds of one step, and of all steps and sample images, at `rate` TFLOP/s."""
        step = self.step.seconds(rate)
        return step, self.steps * step + self.draws * self.drawing.seconds(rate)
