"""Records work on a CUDA device once and replays it as a whole.

Recording ("capturing" in CUDA's terms) notes each kernel with its arguments but runs none of them. A replay
launches the same kernels with the same pointers. It therefore reads the inputs from, and writes the results
to, the addresses of the recording, whatever Python objects exist by then. Three consequences run through this
package:

    inputs     are copied into tensors that stay (`HeldInputs`) before each replay
    weights    must stay where they are; `addresses_of` finds out when they have moved
    results    are overwritten by the next replay, so whatever leaves a recording is cloned
"""

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
    """Records work so that it can be repeated."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Again]:
        """Calls `work` once to record it. Its result need not be computed yet: a CUDA graph only records.

        Returns the tensor that `work` made, and a function that computes it: from the current values of the
        inputs, into the same memory.
        """


class CudaRecorder:
    """Records CUDA graphs.

    All graphs of one recorder allocate from one memory pool. The pool is about as large as the largest graph
    needs, not the sum of all. A replay may overwrite what the replay of another graph left there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Tensor]) -> tuple[Tensor, Again]:
        """Records a CUDA graph, see `GraphRecorder`.

        Raises RuntimeError if something in `work` cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        # If a recording fails, torch leaves its side stream as the current one. The outer `torch.cuda.stream`
        # restores the stream from before.
        #
        # thread_local: NCCL's watchdog thread queries events all the time. In the default mode, "global", a
        # query in any thread breaks the recording.
        try:
            with (
                torch.cuda.device(self._device),
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                made = work()
        except RuntimeError:
            self._end_allocation()
            raise
        return made, graph.replay

    def _end_allocation(self) -> None:
        """Takes torch's allocator out of recording mode after a failed recording.

        torch does not do this if ending the recording raises: the allocator would wait for the end forever
        and keep the pool's memory.
        """
        bindings: Any = torch._C
        with suppress(RuntimeError):  # the recording may have ended properly
            bindings._cuda_endAllocateToPool(self._device.index, self._pool)
            bindings._cuda_releasePool(self._device.index, self._pool)


class HeldInputs:
    """The input tensors that a recording reads, by name. They stay at their addresses for its lifetime."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.held = {
            name: given.clone() if isinstance(given, Tensor) else given for name, given in inputs.items()
        }

    def take(self, inputs: Mapping[str, Any]) -> None:
        """Copies the values of new inputs, which must have the same `input_key`, into the held tensors."""
        for name, held in self.held.items():
            if isinstance(held, Tensor):
                held.copy_(inputs[name])


def input_key(inputs: Mapping[str, Any]) -> Key:
    """Returns a recording's key: shape, dtype and device of each tensor, the value of everything else."""
    device = next(given.device for given in inputs.values() if isinstance(given, Tensor))
    return (autocast_dtype(device.type), *((name, *_fact(given)) for name, given in sorted(inputs.items())))


def _fact(given: Any) -> tuple[object, ...]:
    if isinstance(given, Tensor):
        return given.shape, given.dtype, given.device
    return (tuple(given.items()) if isinstance(given, dict) else given,)


def addresses_of(tensors: Sequence[Tensor]) -> list[tuple[int, bool]]:
    """Returns each weight's address and whether it is trained.

    If an address changes, recordings would read memory that no longer belongs to the weight.
    """
    return [(tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]


def relative_difference(ours: Tensor, theirs: Tensor) -> Tensor:
    """Returns |ours - theirs| / |theirs| over all elements, () fp32; NaN if a value is NaN or infinite."""
    ours, theirs = ours.float(), theirs.float()
    return (ours - theirs).norm() / theirs.norm().clamp_min(torch.finfo(torch.float32).tiny)


def record_or_warn(record: Callable[[], T], device: torch.device, what: str) -> T | None:
    """Returns the result of `record`; logs a warning and returns None if something in it cannot be recorded.

    what: starts the warning: the setting that asks for recording, and what now runs kernel by kernel.
    """
    free_unused(device)
    try:
        return record()
    except RuntimeError as error:
        reason = _reason(error)
    # After the `except` block: its exception's frames keep the failed recording's memory alive.
    log.warning("%s run kernel by kernel because recording failed: %s", what, reason)
    return None


def _reason(error: BaseException) -> str:
    """Returns the first line of the first error.

    Ending a failed recording raises a second error without information.
    """
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().split("\n", 1)[0]
