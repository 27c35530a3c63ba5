"""An optimizer run over a few long tensors in place of hundreds of short ones.

An adapter of FLUX has 836 parameters. An optimizer that launches a handful of kernels for each, or waits for a number
from each, takes 0.14 to 0.2 s a step for what the device does in a few milliseconds (measured on an H200). Here the
parameters become views of a few tensors, and the optimizer knows only those.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

Join = Callable[[list[Parameter]], Iterator[list[Parameter]]]
Build = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def all_in_one(parameters: list[Parameter]) -> Iterator[list[Parameter]]:
    """One long tensor, for optimizers that work value by value."""
    yield parameters


def by_shape(parameters: list[Parameter]) -> Iterator[list[Parameter]]:
    """A stack for each shape, for optimizers that look at rows and columns; vectors, which have neither, in a row."""
    groups: dict[torch.Size, list[Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.shape, []).append(parameter)
    yield from groups.values()


class JoinedOptimizer(torch.optim.Optimizer):
    """Looks from outside as `build`'s optimizer over the parameters themselves: groups, gradients and rate.

    Its state is that of the joined tensors, each under the first parameter that went into it. A parameter without a
    gradient counts as one whose gradient is zero; after a step none has one.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], join: Join, build: Build) -> None:
        """groups: of named parameters, as torch's optimizers take them; `build` is given the same of joined ones."""
        super().__init__(list(groups), {})
        self._parts: list[list[Parameter]] = []
        self._joined: list[Parameter] = []
        inner: list[dict[str, Any]] = []
        for group in self.param_groups:
            parts = list(join(group["params"]))
            joined = [_join(part) for part in parts]
            self._parts += parts
            self._joined += joined
            inner.append({**_settings(group), "params": joined})
        self.inner = build(inner)
        self._pull_settings()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the inner optimizer, with the gradients that there are once the closure has run."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._push_settings()
        for joined, parts in zip(self._joined, self._parts, strict=True):
            assert parts[0].data_ptr() == joined.data_ptr(), (
                "a parameter has left the tensor it was joined to"
            )
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parts]
            joined.grad = _concatenate(gradients, joined)
            # Handed over: both at once would be the peak of a small optimizer's step.
            del gradients
            for part in parts:
                part.grad = None
        self.inner.step()
        for joined in self._joined:
            joined.grad = None
        self._pull_settings()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As Optimizer's. Raises ValueError where parameters come in another order, and so lie elsewhere."""
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        if saved != list(range(len(saved))):
            raise ValueError("the saved optimizer has its parameters in another order")
        super().load_state_dict(state_dict)
        self._push_settings()
        for joined, parts in zip(self._joined, self._parts, strict=True):
            if parts[0] in self.state:
                self.inner.state[joined] = self.state[parts[0]]

    def _push_settings(self) -> None:
        """The inner optimizer takes over this one's settings, the rate above all."""
        for inner, group in zip(self.inner.param_groups, self.param_groups, strict=True):
            inner.update(_settings(group))

    def _pull_settings(self) -> None:
        """This one shows the inner one's settings, among them what it counts, and its state."""
        for inner, group in zip(self.inner.param_groups, self.param_groups, strict=True):
            group.update(_settings(inner))
        for joined, parts in zip(self._joined, self._parts, strict=True):
            if joined in self.inner.state:
                self.state[parts[0]] = self.inner.state[joined]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


def _join(parts: list[Parameter]) -> Parameter:
    """One tensor with all values, of which the parameters become views: matrices of one shape as a stack."""
    with torch.no_grad():
        values = [part.detach() for part in parts]
        alike = values[0].dim() > 1 and all(value.shape == values[0].shape for value in values)
        joined = torch.stack(values) if alike else torch.cat([value.reshape(-1) for value in values])
        views = joined.view(-1).split([value.numel() for value in values])
        for part, view in zip(parts, views, strict=True):
            part.data = view.view(part.shape)
    return Parameter(joined)


def _concatenate(gradients: list[Tensor], joined: Tensor) -> Tensor:
    return torch.cat([gradient.reshape(-1) for gradient in gradients]).view(joined.shape)
