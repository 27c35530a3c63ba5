"""Work that is given to the device again as a whole: what records it, and what a recording is good for."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from halfbyte.quant.layers.autocast import autocast_dtype
from halfbyte.trainer.runtime.device_memory import free_unused

log = logging.getLogger(__name__)

Again = Callable[[], None]
Key = tuple[object, ...]
T = TypeVar("T")


class GraphRecorder(Protocol):
    """Notes what is given to the device."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Again]:
        """Runs `work` once for its notes, whose results need not be there yet.

        Gives the tensor that `work` made, and what computes it again: from what its inputs then hold, into the same
        memory.
        """


class CudaRecorder:
    """Records CUDA graphs. All of one recorder share memory: each may overwrite what another one has left."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Again]:
        """See `GraphRecorder`. Raises RuntimeError where something of it cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        # Where a recording breaks, torch leaves its stream the current one; the context around it takes that back.
        # thread_local: NCCL's watchdog asks after events all the time, which is forbidden where all threads count.
        try:
            with (
                torch.cuda.device(self._device),
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                made = work()
        except RuntimeError:
            self._take_back()
            raise
        return made, graph.replay

    def _take_back(self) -> None:
        """Ends what torch does not where the end of a recording raises: its allocator would wait for it for ever, and
        keep the memory."""
        bindings: Any = torch._C
        with suppress(RuntimeError):  # it had ended
            bindings._cuda_endAllocateToPool(self._device.index, self._pool)
            bindings._cuda_releasePool(self._device.index, self._pool)


class HeldInputs:
    """Inputs of one shape by name, the tensors in memory that a recording reads."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.held = {
            name: given.clone() if isinstance(given, Tensor) else given for name, given in inputs.items()
        }

    def take(self, inputs: Mapping[str, Any]) -> None:
        """Takes over what other inputs of the same key hold."""
        for name, held in self.held.items():
            if isinstance(held, Tensor):
                held.copy_(inputs[name])


def input_key(inputs: Mapping[str, Any]) -> Key:
    """What a recording is good for: shapes and types of the tensors, all else to the value."""
    device = next(given.device for given in inputs.values() if isinstance(given, Tensor))
    return (autocast_dtype(device.type), *((name, *_fact(given)) for name, given in sorted(inputs.items())))


def _fact(given: Any) -> tuple[object, ...]:
    if isinstance(given, Tensor):
        return given.shape, given.dtype, given.device
    return (tuple(given.items()) if isinstance(given, dict) else given,)


def places_of(tensors: Sequence[Tensor]) -> list[tuple[int, bool]]:
    """Where a model's weights are, and which of them learn: elsewhere, a recording reads what is no longer theirs."""
    return [(tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]


def relative_difference(ours: Tensor, theirs: Tensor) -> Tensor:
    """() of what a recording gave from what it should have given; NaN where something is not finite."""
    ours, theirs = ours.float(), theirs.float()
    return (ours - theirs).norm() / theirs.norm().clamp_min(torch.finfo(torch.float32).tiny)


def unless_it_fails(record: Callable[[], T], device: torch.device, what: str) -> T | None:
    """What `record` gives; None where something of it cannot be recorded, which is told.

    what: the setting that asks for it, and what runs kernel by kernel without it.
    """
    free_unused(device)
    try:
        return record()
    except RuntimeError as error:
        reason = _reason(error)
    # Behind the exception, whose frames hold what was taken.
    log.warning("%s run kernel by kernel, for recording failed: %s", what, reason)
    return None


def _reason(error: BaseException) -> str:
    """What went wrong first: the end of a recording that broke raises once more, and tells nothing."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().split("\n", 1)[0]
