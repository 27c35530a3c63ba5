"""AdamW with 8-bit moments as an optimizer of torch: a quarter of the state, one kernel for all parameters."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from halfbyte.kernels.adamw_8bit import reference as adamw_8bit_reference
from halfbyte.kernels.adamw_8bit.reference import BLOCK, AdamStep, Moments

_FIELDS = ("mean", "mean_scale", "square", "square_scale")


class AdamW8bit(torch.optim.Optimizer):
    """Moments as bytes with a scale for each 256, see `halfbyte.kernels.adamw_8bit.reference`.

    Takes groups of named parameters, contiguous and fp32, on one device.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        super().__init__(list(groups), defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                assert parameter.dtype == torch.float32, f"expected fp32 parameters, got {parameter.dtype}"
                assert parameter.is_contiguous(), "expected contiguous parameters"
        # Of each group, the moments of its parameters in a row, each's padded to whole blocks.
        self._moments: list[Moments] = []
        self._tables: list[Any] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Moves every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._in_a_row()
        for number, group in enumerate(self.param_groups):
            self._step(number, group)
        return loss

    def _step(self, number: int, group: dict[str, Any]) -> None:
        group["step"] += 1
        beta1, beta2 = group["betas"]
        step = AdamStep(group["step"], group["lr"], (beta1, beta2), group["eps"], group["weight_decay"])
        parameters: list[Parameter] = group["params"]
        gradients = [None if p.grad is None else p.grad.contiguous() for p in parameters]
        if parameters[0].is_cuda:
            # Triton is there where CUDA is, and need not be elsewhere.
            from halfbyte.kernels.adamw_8bit import cuda as adamw_8bit_triton

            if not self._tables:
                self._tables = [
                    adamw_8bit_triton.ParameterTable(each["params"]) for each in self.param_groups
                ]
            table, moments = self._tables[number], self._moments[number]
            adamw_8bit_triton.update(table, parameters, gradients, moments, step)
            return
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                own = Moments(**{name: self.state[parameter][name] for name in _FIELDS})
                adamw_8bit_reference.update(parameter, gradient, own, step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As Optimizer's, which would turn the bytes into floats as the parameters are."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        if not state_dict["state"]:
            return
        self._moments = []
        self._in_a_row()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(parameters):
            for name in _FIELDS:
                self.state[parameter][name].copy_(state_dict["state"][number][name])

    def _in_a_row(self) -> None:
        """Makes all moments, at the first step; each parameter's state is a part of them."""
        if not self._moments:
            self._moments = [self._of_group(group["params"]) for group in self.param_groups]

    def _of_group(self, parameters: list[Parameter]) -> Moments:
        device = parameters[0].device
        blocks = [-(-parameter.numel() // BLOCK) for parameter in parameters]
        total = sum(blocks)

        def zeros(count: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        moments = Moments(
            zeros(total * BLOCK, torch.uint8),
            zeros(total, torch.float32),
            zeros(total * BLOCK, torch.uint8),
            zeros(total, torch.float32),
        )
        first = 0
        for parameter, count in zip(parameters, blocks, strict=True):
            values = slice(first * BLOCK, first * BLOCK + parameter.numel())
            scales = slice(first, first + count)
            self.state[parameter] = {
                "mean": moments.mean[values],
                "mean_scale": moments.mean_scale[scales],
                "square": moments.square[values],
                "square_scale": moments.square_scale[scales],
            }
            first += count
        return moments
