"""A model's forward and backward as two recordings that are replayed together.

Memory, and how long its content is valid:

    held inputs       outside the pool, one per step    filled before each forward replay
    activations       in the recorder's pool            from a forward replay to the end of its backward replay
    output            in the pool                       until the next replay of any recording: cloned at once
    output gradient   outside the pool, one per step    filled before each backward replay
    gradients         outside the pool, for all steps   until the next backward replay: cloned at once

Since all recordings share the pool, no other forward may be replayed between a forward and its backward.
`Turn` stands for this interval.

torch's own `make_graphed_callables` is not used. Its backward returns the recording's own buffers, which
become the parameters' `.grad`; with several micro-batches per step, each would overwrite the sum of the ones
before. Here everything that leaves a recording is a copy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from halfbyte.trainer.cuda_graphs.recorder import GraphRecorder, HeldInputs


class Gradients:
    """One buffer for the gradients of all parameters, in their order. The recorded backward ends in it."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        first = parameters[0]
        assert all(parameter.dtype == first.dtype for parameter in parameters), "all adapters share one dtype"
        self._parameters = list(parameters)
        sizes = [parameter.numel() for parameter in parameters]
        self.memory = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        parts = self.memory.split(sizes)
        self._parts = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]

    def gather(self, found: Sequence[Tensor | None]) -> list[bool]:
        """Copies the gradients into the buffer and returns, for each parameter, whether it has one."""
        pairs = [(part, grad) for part, grad in zip(self._parts, found, strict=True) if grad is not None]
        torch._foreach_copy_([part for part, _ in pairs], [grad for _, grad in pairs])
        return [grad is not None for grad in found]

    def copies(self) -> list[Tensor]:
        """Returns the gradients, one per parameter, in one new copy of the buffer: a single copy kernel."""
        utilities: Any = torch._utils
        copies: list[Tensor] = utilities._unflatten_dense_tensors(self.memory.clone(), self._parameters)
        return copies


class Turn:
    """The time from a forward replay to the end of its backward, during which the pool holds its activations.

    Autograd's graph owns the turn through `_Replay`. If the graph is dropped without a backward, so is the
    turn.
    """

    over = False

    def end(self) -> None:
        """Ends the turn.

        Raises RuntimeError at the second call: the first backward has overwritten the activations.
        """
        if self.over:
            raise RuntimeError(
                "train.cuda_graphs: the backward of a recorded step ran twice, but it can run only once; set"
                " train.cuda_graphs to false to call it again"
            )
        self.over = True


class RecordedStep:
    """One model's forward and backward, recorded for inputs of one shape."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        inputs: Mapping[str, Any],
        recorder: GraphRecorder,
        gradients: Gradients,
        *,
        autocast: torch.dtype | None,
    ) -> None:
        """Records both passes with the values in `inputs`.

        The model is called with `inputs` as keyword arguments and returns a tuple of one tensor. parameters:
        the model's trained parameters by name. autocast: the dtype of the forward's autocast region; None: no
        autocast.
        """
        self._parameters = tuple(parameters.values())
        self._inputs = HeldInputs(inputs)
        self._gradients = gradients
        self._has_gradient: list[bool] = []
        device_type = self._parameters[0].device.type
        # New leaves over the parameters' memory. Backward into the parameters themselves would end in the
        # nodes that sum up `.grad` and start DDP's all-reduce on an ordinary step's stream, and record both.
        leaves: dict[str, Tensor] = {
            name: nn.Parameter(parameter.detach()) for name, parameter in parameters.items()
        }
        # Hands the forward's output, with its autograd graph, to the backward's recording.
        outputs: list[Tensor] = []

        def forward() -> Tensor:
            # No cache: autocast would reuse a bf16 copy of an adapter made before the recording. Every replay
            # would read that copy and never see the adapter change.
            with torch.autocast(device_type, autocast, enabled=autocast is not None, cache_enabled=False):
                outputs[:] = functional_call(model, leaves, kwargs=self._inputs.held)
            (output,) = outputs
            return output.detach()

        def backward() -> Tensor:
            # Without autocast, as in an ordinary step: Lightning calls backward outside its autocast region.
            with torch.autocast(device_type, enabled=False):
                found = torch.autograd.grad(
                    outputs, list(leaves.values()), [self._output_grad], allow_unused=True
                )
            # Frees the autograd graph and its activations: the next recording can use their memory.
            outputs.clear()
            self._has_gradient = gradients.gather(found)
            return gradients.memory

        # The forward's activations lie in the pool now. They stay allocated until `backward` has been
        # recorded, so its kernels read them at the right addresses.
        self._output, self._forward_again = recorder.record(forward)
        # Allocated between the two recordings, so it is not in the pool.
        self._output_grad = torch.zeros_like(self._output)
        _, self._backward_again = recorder.record(backward)

    def __call__(self, turn: Turn, inputs: Mapping[str, Any]) -> Tensor:
        """Returns the output for `inputs`; its backward reaches the parameters as the plain model's would."""
        output: Tensor = _Replay.apply(self, turn, inputs, *self._parameters)
        return output

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        """Replays the forward and returns a copy of the output."""
        self._inputs.take(inputs)
        self._forward_again()
        return self._output.clone()

    def backward(self, grad: Tensor) -> list[Tensor | None]:
        """Replays the backward from dL/doutput and returns copies of the parameters' gradients."""
        self._output_grad.copy_(grad)
        self._backward_again()
        copies = self._gradients.copies()
        return [copy if has else None for copy, has in zip(copies, self._has_gradient, strict=True)]


class _Replay(torch.autograd.Function):
    """(step, turn, inputs, *parameters) -> the output.

    The parameters are arguments so that autograd adds the replay's gradients to their `.grad`.
    """

    @staticmethod
    def forward(ctx: Any, step: RecordedStep, turn: Turn, inputs: Mapping[str, Any], *_: Tensor) -> Tensor:
        ctx.step, ctx.turn = step, turn
        return step.forward(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.turn.end()
        return None, None, None, *ctx.step.backward(grad)
