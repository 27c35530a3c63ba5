"""A denoiser's forward without gradients as CUDA graphs, recorded once for each shape of its inputs.

The first call of a shape runs as ever, which compiles what it needs; the second runs as ever, is recorded, and has to
give the same when it is replayed; from then on it is replayed alone. The graphs share one piece of memory, and what
leaves it is copied: the next forward writes over it.

Pipelines call the denoiser itself, so its `forward` is what is replaced, on the object; all else of it stays.
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
    input_key,
    places_of,
    relative_difference,
    unless_it_fails,
)
from halfbyte.trainer.runtime.device_memory import free_unused

MOST_FORWARDS = 4
# They are the very same kernels; what is read or written in a wrong place is off by its own size.
_LARGEST_DIFFERENCE = 0.01

NewRecorder = Callable[[torch.device], GraphRecorder]


class RecordedForward:
    """One forward for inputs of one key."""

    def __init__(
        self, forward: Callable[..., tuple[Tensor]], inputs: Mapping[str, Any], recorder: GraphRecorder
    ) -> None:
        """`forward` is called with `inputs` by name, and gives a tuple of one tensor."""
        self._inputs = HeldInputs(inputs)

        @torch.no_grad()
        def work() -> Tensor:
            (output,) = forward(**self._inputs.held)
            return output

        self._output, self._again = recorder.record(work)

    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        """The output, a tensor of its own."""
        self._inputs.take(inputs)
        self._again()
        return self._output.clone()


class RecordedForwards:
    """Is called in place of a denoiser's `forward`; records and replays where the call is one of sampling."""

    def __init__(self, denoiser: nn.Module, recorder: NewRecorder) -> None:
        """`denoiser` has its adapters on it, and lies where it computes."""
        self._plain: Callable[..., Any] = denoiser.forward
        self._new_recorder = recorder
        self._tensors = [*denoiser.parameters(), *denoiser.buffers()]
        self._adapters = [module for module in denoiser.modules() if isinstance(module, PeftLayer)]
        self._device = self._tensors[0].device
        # What accelerate moves is elsewhere at every call.
        self._works = not any(hasattr(module, "_hf_hook") for module in denoiser.modules()) and all(
            tensor.device == self._device for tensor in self._tensors
        )
        self.release()

    @property
    def shapes(self) -> int:
        """How many are recorded."""
        return len(self._recorded)

    def release(self) -> None:
        """Gives up what is recorded, with its memory."""
        self._recorded: dict[Key, RecordedForward] = {}  # the one used last is the last
        self._recorder: GraphRecorder | None = None
        self._warm: set[Key] = set()  # run once
        self._state: list[object] = []

    def __call__(self, *arguments: Any, **inputs: Any) -> Any:
        """What the forward gives."""
        if arguments or not self._can_record(inputs):
            return self._plain(*arguments, **inputs)
        self._check_state()
        key = input_key(inputs)
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
        # Pipelines give a dictionary of attention's settings, which is empty unless somebody asks for some.
        return given is None or given == {} or isinstance(given, bool | int | float | str)

    def _check_state(self) -> None:
        """Where weights lie and which adapters are on is part of the kernels that are recorded."""
        state: list[object] = [
            *places_of(self._tensors),
            *(
                (layer.disable_adapters, layer.merged, *layer.active_adapters, *layer.scaling.values())
                for layer in self._adapters
            ),
        ]
        if state != self._state:
            self.release()
            self._state = state

    def _record(self, inputs: Mapping[str, Any]) -> RecordedForward | None:
        """None where it cannot be done, which is told, and not tried again."""
        if len(self._recorded) == MOST_FORWARDS:
            del self._recorded[next(iter(self._recorded))]

        expected = self._plain(**inputs)[0]

        def record() -> RecordedForward:
            if self._recorder is None:
                self._recorder = self._new_recorder(self._device)
            forward = RecordedForward(self._plain, inputs, self._recorder)
            off = relative_difference(forward(inputs), expected)
            if not off <= _LARGEST_DIFFERENCE:
                raise RuntimeError(f"what was recorded gives something else, by {off:.1%}")
            return forward

        forward = unless_it_fails(record, self._device, "--compile: forwards")
        if forward is None:
            self._works = False
            self.release()
            free_unused(self._device)
        return forward


@contextmanager
def recorded_forwards(
    denoiser: nn.Module, recorder: NewRecorder = CudaRecorder
) -> Iterator[RecordedForwards]:
    """Within it the denoiser's forwards are recorded; behind it all is as before, and the memory is free again."""
    forwards = RecordedForwards(denoiser, recorder)

    @functools.wraps(denoiser.forward)
    def forward(*arguments: Any, **inputs: Any) -> Any:
        return forwards(*arguments, **inputs)

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
