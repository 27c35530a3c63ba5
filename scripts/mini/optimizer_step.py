"""One optimizer step; a GPU records it once and replays it, because a model this small waits for its launches."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

_WARM = 5  # steps before the recording: compilation and the libraries' workspaces


class OptimizerStep:
    """Forward, backward, clipping and AdamW over inputs of fixed shapes; bf16 arithmetic on a GPU."""

    def __init__(
        self, weights: Sequence[nn.Parameter], loss: Callable[..., Tensor], *, learning_rate: float
    ) -> None:
        """`loss` takes the inputs; nothing in it may depend on their values or wait for the GPU."""
        self._device = device = weights[0].device
        self._weights = weights
        self._loss = loss
        self._on_gpu = device.type == "cuda"
        # A tensor, because each replay reads its current value.
        self._rate = torch.tensor(learning_rate, device=device)
        self._optimizer = torch.optim.AdamW(
            weights, lr=self._rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True, capturable=self._on_gpu
        )
        self._inputs: tuple[Tensor, ...] = ()
        self._value = torch.zeros((), device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._done = 0

    def __call__(self, inputs: Sequence[Tensor], rate: float) -> Tensor:
        """Takes the step at a learning rate; returns the loss before it, which the next call overwrites."""
        self._rate.fill_(rate)
        if not self._on_gpu:
            self._inputs = tuple(inputs)
            self._run()
            return self._value
        if not self._inputs:
            self._inputs = tuple(torch.empty_like(one) for one in inputs)
        for kept, new in zip(self._inputs, inputs, strict=True):
            kept.copy_(new)
        if self._done < _WARM:
            self._run_aside()
        else:
            if self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):
                    self._run()
            self._graph.replay()
        self._done += 1
        return self._value

    def _run(self) -> None:
        # Gradients that are None are written instead of added to, and so in every replay.
        self._optimizer.zero_grad(set_to_none=True)
        # A cache of casts would keep those of the recording.
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._on_gpu, cache_enabled=False):
            value = self._loss(*self._inputs)
        value.backward()
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._value.copy_(value.detach())

    def _run_aside(self) -> None:
        """Runs on a separate stream, as the warm-up of CUDA graphs requires."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._run()
        torch.cuda.current_stream().wait_stream(aside)
