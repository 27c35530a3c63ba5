"""Runs a denoiser's forward in sampling as CUDA graphs, recorded once for each shape of its inputs.

Each call with a new input key (see `input_key`) goes through these states:

    1st call    runs eagerly, which compiles the kernels it needs
    2nd call    runs eagerly, is recorded and replayed; both outputs must agree
    later       is replayed only

The graphs share one memory pool, and the next replay overwrites it, so each output is copied out.

Pipelines call the denoiser object itself. Therefore `recorded_forwards` replaces `forward` on that object and
leaves everything else of it unchanged.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer as PeftLayer
from torch import Tensor, nn

from halfbyte.quant.layers.autocast import autocast_dtype
from halfbyte.trainer.cuda_graphs.recorder import (
    CudaRecorder,
    GraphRecorder,
    HeldInputs,
    Key,
    addresses_of,
    input_key,
    record_or_warn,
    relative_difference,
)
from halfbyte.trainer.runtime.device_memory import free_unused

MOST_FORWARDS = 4
# A replay runs the same kernels as the eager call, so it agrees to rounding. A kernel that reads or writes a
# wrong address causes an error as large as the output itself.
_LARGEST_DIFFERENCE = 0.01

NewRecorder = Callable[[torch.device], GraphRecorder]


class RecordedForward:
    """One forward, recorded for inputs of one key."""

    def __init__(
        self, forward: Callable[..., tuple[Tensor]], inputs: Mapping[str, Any], recorder: GraphRecorder
    ) -> None:
        """Records `forward`, which takes `inputs` as keyword arguments and returns a tuple of one tensor."""
        self._inputs = HeldInputs(inputs)

        @torch.no_grad()
        def work() -> Tensor:
            (output,) = forward(**self._inputs.held)
            return output

        self._output, self._again = recorder.record(work)

    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        """Replays the forward for new inputs and returns a copy of the output."""
        self._inputs.take(inputs)
        self._again()
        return self._output.clone()


class RecordedForwards:
    """Stands in for a denoiser's `forward`: records and replays the calls of sampling, passes on others."""

    def __init__(self, denoiser: nn.Module, recorder: NewRecorder) -> None:
        """`denoiser` must already have its adapters and be on the device it computes on."""
        self._plain: Callable[..., Any] = denoiser.forward
        self._new_recorder = recorder
        self._tensors = [*denoiser.parameters(), *denoiser.buffers()]
        self._adapters = [module for module in denoiser.modules() if isinstance(module, PeftLayer)]
        self._device = self._tensors[0].device
        # accelerate's offloading moves weights, so they have another address at every call.
        self._works = not any(hasattr(module, "_hf_hook") for module in denoiser.modules()) and all(
            tensor.device == self._device for tensor in self._tensors
        )
        self.release()

    @property
    def shapes(self) -> int:
        """Number of recorded shapes."""
        return len(self._recorded)

    def release(self) -> None:
        """Drops all recordings and their memory."""
        self._recorded: dict[Key, RecordedForward] = {}  # in order of use, the last used at the end
        self._recorder: GraphRecorder | None = None
        self._warm: set[Key] = set()  # keys that have run eagerly once
        self._state: list[object] = []

    def __call__(self, *arguments: Any, **inputs: Any) -> Any:
        """Returns what the plain forward returns."""
        if arguments or not self._can_record(inputs):
            return self._plain(*arguments, **inputs)
        self._check_state()
        key = input_key(inputs)
        # Taken out here and put back below, which moves it to the end of the order of use.
        forward = self._recorded.pop(key, None)
        if forward is None and key in self._warm:
            forward = self._record(inputs)
        if forward is None:
            self._warm.add(key)
            return self._plain(**inputs)
        self._recorded[key] = forward
        return (forward(inputs),)

    def _can_record(self, inputs: Mapping[str, Any]) -> bool:
        return (
            self._works
            and inputs.get("return_dict") is False
            and not (torch.is_grad_enabled() or torch.is_inference_mode_enabled())
            and autocast_dtype(self._device.type) is None
            and all(self._can_hold(given) for given in inputs.values())
        )

    def _can_hold(self, given: Any) -> bool:
        if isinstance(given, Tensor):
            return given.device == self._device
        # Pipelines pass a dictionary of attention settings, which is empty unless the caller sets some.
        return given is None or given == {} or isinstance(given, bool | int | float | str)

    def _check_state(self) -> None:
        """Drops the recordings if a weight has moved or the active adapters or their scales have changed.

        The recorded kernels contain all of these as constants.
        """
        state: list[object] = [
            *addresses_of(self._tensors),
            *(
                (layer.disable_adapters, layer.merged, *layer.active_adapters, *layer.scaling.values())
                for layer in self._adapters
            ),
        ]
        if state != self._state:
            self.release()
            self._state = state

    def _record(self, inputs: Mapping[str, Any]) -> RecordedForward | None:
        """Records a forward. If that fails, logs a warning, gives up recording for good and returns None."""
        if len(self._recorded) == MOST_FORWARDS:  # drop the one not used for the longest time
            del self._recorded[next(iter(self._recorded))]

        expected = self._plain(**inputs)[0]

        def record() -> RecordedForward:
            if self._recorder is None:
                self._recorder = self._new_recorder(self._device)
            forward = RecordedForward(self._plain, inputs, self._recorder)
            off = relative_difference(forward(inputs), expected)
            if not off <= _LARGEST_DIFFERENCE:
                raise RuntimeError(
                    f"the replayed output differs from the eager one by {off:.1%}, expected at most"
                    f" {_LARGEST_DIFFERENCE:.0%}"
                )
            return forward

        forward = record_or_warn(record, self._device, "--compile: forwards")
        if forward is None:
            self._works = False
            self.release()
            free_unused(self._device)
        return forward


@contextmanager
def recorded_forwards(
    denoiser: nn.Module, recorder: NewRecorder = CudaRecorder
) -> Iterator[RecordedForwards]:
    """Records the denoiser's forwards within the context, then restores `forward` and frees the memory."""
    forwards = RecordedForwards(denoiser, recorder)

    @functools.wraps(denoiser.forward)
    def forward(*arguments: Any, **inputs: Any) -> Any:
        return forwards(*arguments, **inputs)

    # The object may already have its own `forward` (accelerate installs one); otherwise the class's applies.
    own = vars(denoiser)
    before = own.get("forward")
    own["forward"] = forward
    try:
        yield forwards
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before
        forwards.release()
