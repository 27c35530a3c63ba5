"""The denoiser of a training step as CUDA graphs, recorded once for each shape of its inputs.

A FLUX step is some 6000 kernels. Launched one by one from Python they take longer than a GPU computes at 512 px; as a
graph they are launched at once, and are the very same kernels.

The first step of a shape runs as ever, which compiles what it needs; the next one is recorded. All recordings share
one piece of memory, which stays theirs: a backward has to come before the next forward, or that one runs as ever.
`recorded_warm_up` runs all shapes ahead of the first recording, lest any runs as ever beside that memory.
"""

import logging
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.quant.layers.autocast import autocast_dtype
from halfbyte.trainer.adapters.lora import trained_parameters
from halfbyte.trainer.cuda_graphs.recorder import (
    CudaRecorder,
    GraphRecorder,
    Key,
    input_key,
    places_of,
    unless_it_fails,
)
from halfbyte.trainer.cuda_graphs.step import Gradients, RecordedStep, Turn
from halfbyte.trainer.runtime.device_memory import free_unused

log = logging.getLogger(__name__)

MOST_SHAPES = 16  # each takes some MiB of the device beside the shared memory, and seconds to record


class GraphedDenoiser:
    """Is called in place of the denoiser; records and replays where the call is one of a training step."""

    def __init__(
        self, denoiser: nn.Module, *, recorder: Callable[[torch.device], GraphRecorder] = CudaRecorder
    ) -> None:
        self._denoiser = denoiser
        self._new_recorder = recorder
        self._warm: set[Key] = set()  # run once, with their backward
        self._works = True
        self._told = False
        self.release()

    @property
    def shapes(self) -> int:
        """How many are recorded."""
        return len(self._steps)

    def release(self) -> None:
        """Gives up what is recorded, with its memory; a later step records anew."""
        self._steps: dict[Key, RecordedStep] = {}
        self._recorder: GraphRecorder | None = None
        self._gradients: Gradients | None = None
        self._held: list[Tensor] = []
        self._places: list[tuple[int, bool]] = []
        self._turn: Callable[[], Turn | None] = lambda: None

    @property
    def works(self) -> bool:
        """Whether steps are recorded still."""
        return self._works

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that learn."""
        return list(trained_parameters(self._denoiser).values())

    def give_up(self, reason: str) -> None:
        """Runs every step as ever from now on, and says why."""
        log.warning("train.cuda_graphs: steps run kernel by kernel, for %s", reason)
        self._stop()

    def drop_gradients(self) -> None:
        """Of the parameters that learn."""
        for parameter in self.parameters:
            parameter.grad = None

    def __call__(self, **inputs: Any) -> tuple[Tensor]:
        """What the denoiser gives, with `return_dict=False`."""
        if not self._is_for_training(inputs):
            return self._plain(inputs)
        key = input_key(inputs)
        self._check_places()
        turn = self._turn()
        step = self._steps.get(key)
        if turn is not None and not turn.over:
            return self._plain(inputs)  # the backward of another one would find this one's activations
        if step is None and key in self._warm and self._has_room():
            step = self._record(key, inputs)
        if step is None:
            output = self._plain(inputs)
            output[0].register_hook(partial(self._warmed, key))
            return output
        turn = Turn()
        self._turn = weakref.ref(turn)
        return (step(turn, inputs),)

    def _plain(self, inputs: Mapping[str, Any]) -> tuple[Tensor]:
        output: tuple[Tensor] = self._denoiser(**inputs)
        return output

    def _is_for_training(self, inputs: Mapping[str, Any]) -> bool:
        return (
            self._works
            and self._denoiser.training
            and torch.is_grad_enabled()
            and not any(isinstance(given, Tensor) and given.requires_grad for given in inputs.values())
        )

    def _warmed(self, key: Key, _: Tensor) -> None:
        self._warm.add(key)

    def _check_places(self) -> None:
        """Kernels that are recorded read weights where these were then: elsewhere, they are recorded anew."""
        if self._places and self._places != places_of(self._held):
            self.release()

    def _has_room(self) -> bool:
        if len(self._steps) < MOST_SHAPES:
            return True
        if not self._told:
            log.info("train.cuda_graphs: %d sizes are recorded; others run kernel by kernel", MOST_SHAPES)
            self._told = True
        return False

    def _record(self, key: Key, inputs: Mapping[str, Any]) -> RecordedStep | None:
        """None where it cannot be done, which is told, and not tried again."""
        parameters = trained_parameters(self._denoiser)
        device = next(iter(parameters.values())).device

        def record() -> RecordedStep:
            if self._recorder is None or self._gradients is None:
                self._recorder = self._new_recorder(device)
                self._gradients = Gradients(list(parameters.values()))
                self._held = [*self._denoiser.parameters(), *self._denoiser.buffers()]
                self._places = places_of(self._held)
            return RecordedStep(
                self._denoiser,
                parameters,
                inputs,
                self._recorder,
                self._gradients,
                autocast=autocast_dtype(device.type),
            )

        step = unless_it_fails(record, device, "train.cuda_graphs: steps")
        if step is None:
            self._stop()
        else:
            self._steps[key] = step
        return step

    def _stop(self) -> None:
        self._works = False
        self.release()
        free_unused(self.parameters[0].device)
