"""A model's forward and backward, recorded once on tensors that stay and given to the device again as a whole.

torch's own `make_graphed_callables` is not used: its backward gives out the recording's own buffers, which become
the parameters' `.grad`, so that the sum over micro-batches is overwritten by each of them. Here all that leaves a
recording is copied out of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from halfbyte.trainer.cuda_graphs.recorder import GraphRecorder, HeldInputs


class Gradients:
    """One piece of memory for the gradients of all parameters, in their order."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        first = parameters[0]
        assert all(parameter.dtype == first.dtype for parameter in parameters), "adapters are of one dtype"
        self._parameters = list(parameters)
        sizes = [parameter.numel() for parameter in parameters]
        self.memory = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        parts = self.memory.split(sizes)
        self._parts = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]

    def gather(self, found: Sequence[Tensor | None]) -> list[bool]:
        """Takes the gradients over; gives which of the parameters have one."""
        pairs = [(part, grad) for part, grad in zip(self._parts, found, strict=True) if grad is not None]
        torch._foreach_copy_([part for part, _ in pairs], [grad for _, grad in pairs])
        return [grad is not None for grad in found]

    def copies(self) -> list[Tensor]:
        """Each parameter's, as tensors of their own in one new piece of memory."""
        utilities: Any = torch._utils
        copies: list[Tensor] = utilities._unflatten_dense_tensors(self.memory.clone(), self._parameters)
        return copies


class Turn:
    """From a forward to its backward, which reads what the forward left in the memory of all recordings."""

    over = False

    def end(self) -> None:
        """Raises RuntimeError at the second call: the backward itself has overwritten what it needs."""
        if self.over:
            raise RuntimeError("train.cuda_graphs: the backward of a recorded step can run only once")
        self.over = True


class RecordedStep:
    """One model's forward and backward for inputs of one shape."""

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
        """parameters: of the model, those that learn, by name. autocast: what the forward computes in; None: off.

        The model is called with `inputs` by name, and gives a tuple of one tensor.
        """
        self._parameters = tuple(parameters.values())
        self._inputs = HeldInputs(inputs)
        self._gradients = gradients
        self._has_gradient: list[bool] = []
        device_type = self._parameters[0].device.type
        # Leaves of their own over the same memory. The parameters' own end in what adds gradients up and tells DDP of
        # them, on the stream of an ordinary step: both would get into the recording.
        leaves: dict[str, Tensor] = {
            name: nn.Parameter(parameter.detach()) for name, parameter in parameters.items()
        }
        outputs: list[Tensor] = []

        def forward() -> Tensor:
            # A cast of an adapter that was cached outside would be read for ever.
            with torch.autocast(device_type, autocast, enabled=autocast is not None, cache_enabled=False):
                outputs[:] = functional_call(model, leaves, kwargs=self._inputs.held)
            (output,) = outputs
            return output.detach()

        def backward() -> Tensor:
            # Lightning's backward is outside of its autocast.
            with torch.autocast(device_type, enabled=False):
                found = torch.autograd.grad(
                    outputs, list(leaves.values()), [self._output_grad], allow_unused=True
                )
            outputs.clear()
            self._has_gradient = gradients.gather(found)
            return gradients.memory

        self._output, self._forward_again = recorder.record(forward)
        self._output_grad = torch.zeros_like(self._output)
        _, self._backward_again = recorder.record(backward)

    def __call__(self, turn: Turn, inputs: Mapping[str, Any]) -> Tensor:
        """What the model gives for `inputs`, whose gradients go to the parameters as those of the model do."""
        output: Tensor = _Replay.apply(self, turn, inputs, *self._parameters)
        return output

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        """The output, a tensor of its own."""
        self._inputs.take(inputs)
        self._forward_again()
        return self._output.clone()

    def backward(self, grad: Tensor) -> list[Tensor | None]:
        """The parameters' gradients from the output's, tensors of their own."""
        self._output_grad.copy_(grad)
        self._backward_again()
        copies = self._gradients.copies()
        return [copy if has else None for copy, has in zip(copies, self._has_gradient, strict=True)]


class _Replay(torch.autograd.Function):
    """(the parameters) -> the output."""

    @staticmethod
    def forward(ctx: Any, step: RecordedStep, turn: Turn, inputs: Mapping[str, Any], *_: Tensor) -> Tensor:
        ctx.step, ctx.turn = step, turn
        return step.forward(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.turn.end()
        return None, None, None, *ctx.step.backward(grad)
