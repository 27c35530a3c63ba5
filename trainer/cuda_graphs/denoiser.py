"""Runs the denoiser of a training step as CUDA graphs, recorded once for each shape of its inputs.

A FLUX step is about 6000 kernels. At 512 px, launching them one by one from Python takes longer than the GPU
needs to compute them. A graph launches the same kernels all at once.

Each call with a new input key (see `input_key`) goes through these states:

    1st call    runs eagerly, with its backward: this compiles the kernels, which a recording must not do
    2nd call    is recorded, then replayed
    later       is replayed

All recordings share one memory pool, which stays allocated. A forward that comes before the backward of the
last replayed forward would overwrite its activations, so it runs eagerly. `warm_up` runs all shapes before
the first is recorded, so no eager step allocates on top of the pool.
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
    addresses_of,
    input_key,
    record_or_warn,
)
from halfbyte.trainer.cuda_graphs.step import Gradients, RecordedStep, Turn
from halfbyte.trainer.runtime.device_memory import free_unused

log = logging.getLogger(__name__)

MOST_SHAPES = 16  # each takes a few MiB of device memory besides the shared pool, and seconds to record


class GraphedDenoiser:
    """Stands in for the denoiser: records and replays the calls of training steps, passes on others."""

    def __init__(
        self, denoiser: nn.Module, *, recorder: Callable[[torch.device], GraphRecorder] = CudaRecorder
    ) -> None:
        self._denoiser = denoiser
        self._new_recorder = recorder
        self._warm: set[Key] = set()  # keys that have run eagerly once, with their backward
        self._works = True
        self._limit_logged = False
        self.release()

    @property
    def shapes(self) -> int:
        """Number of recorded shapes."""
        return len(self._steps)

    def release(self) -> None:
        """Drops all recordings and their memory; later steps are recorded again."""
        self._steps: dict[Key, RecordedStep] = {}
        self._recorder: GraphRecorder | None = None
        self._gradients: Gradients | None = None
        self._weights: list[Tensor] = []  # the denoiser's parameters and buffers ...
        self._addresses: list[tuple[int, bool]] = []  # ... and where they were at the first recording
        self._turn: Callable[[], Turn | None] = lambda: None  # a weak reference to the last forward's turn

    @property
    def works(self) -> bool:
        """True until recording has been given up."""
        return self._works

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return list(trained_parameters(self._denoiser).values())

    def give_up(self, reason: str) -> None:
        """Runs every step eagerly from now on, and logs the reason."""
        log.warning("train.cuda_graphs: steps run kernel by kernel because %s", reason)
        self._stop()

    def drop_gradients(self) -> None:
        """Clears the gradients of the trained parameters."""
        for parameter in self.parameters:
            parameter.grad = None

    def __call__(self, **inputs: Any) -> tuple[Tensor]:
        """Returns the denoiser's output as a tuple of one tensor, as with `return_dict=False`."""
        if not self._is_for_training(inputs):
            return self._plain(inputs)
        key = input_key(inputs)
        self._check_addresses()
        turn = self._turn()
        step = self._steps.get(key)
        # The pool still holds the activations of the last replayed forward, whose backward has yet to come.
        if turn is not None and not turn.over:
            return self._plain(inputs)
        if step is None and key in self._warm and self._has_room():
            step = self._record(key, inputs)
        if step is None:
            output = self._plain(inputs)
            # The hook runs in the backward: a forward without one does not count, its backward is not
            # compiled.
            output[0].register_hook(partial(self._warmed, key))
            return output
        turn = Turn()
        # Weak: if the caller drops the output without a backward, the turn is gone and the pool is free.
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

    def _check_addresses(self) -> None:
        """Drops the recordings if a weight has moved: their kernels read the old address."""
        if self._addresses and self._addresses != addresses_of(self._weights):
            self.release()

    def _has_room(self) -> bool:
        if len(self._steps) < MOST_SHAPES:
            return True
        if not self._limit_logged:
            log.info("train.cuda_graphs: %d sizes are recorded; others run kernel by kernel", MOST_SHAPES)
            self._limit_logged = True
        return False

    def _record(self, key: Key, inputs: Mapping[str, Any]) -> RecordedStep | None:
        """Records a step. If that fails, logs a warning, gives up recording for good and returns None."""
        parameters = trained_parameters(self._denoiser)
        device = next(iter(parameters.values())).device

        def record() -> RecordedStep:
            # Shared by all steps: one memory pool, one gradient buffer, one list of addresses.
            if self._recorder is None or self._gradients is None:
                self._recorder = self._new_recorder(device)
                self._gradients = Gradients(list(parameters.values()))
                self._weights = [*self._denoiser.parameters(), *self._denoiser.buffers()]
                self._addresses = addresses_of(self._weights)
            return RecordedStep(
                self._denoiser,
                parameters,
                inputs,
                self._recorder,
                self._gradients,
                autocast=autocast_dtype(device.type),
            )

        step = record_or_warn(record, device, "train.cuda_graphs: steps")
        if step is None:
            self._stop()
        else:
            self._steps[key] = step
        return step

    def _stop(self) -> None:
        self._works = False
        self.release()
        free_unused(self.parameters[0].device)
