"""AdamW with 8-bit moments as a torch optimizer: a quarter of AdamW's state, and one kernel launch per group.

Numerics: each moment is one byte per value plus one fp32 scale per block of 256 values, and value =
code[byte] * scale, where the scale is the block's largest magnitude. A step dequantizes the moments, updates
them in fp32, moves the fp32 weights with the fp32 moments, and only then rounds the moments back to bytes.
The rounding error therefore enters the state, but never the current step. See
`halfbyte.kernels.adamw_8bit.reference` for the codes and formulas.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from halfbyte.kernels.adamw_8bit import reference as adamw_8bit_reference
from halfbyte.kernels.adamw_8bit.reference import BLOCK, AdamStep, Moments

_FIELDS = ("mean", "mean_scale", "square", "square_scale")


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose two moments are stored as bytes, with one scale per block of 256 values.

    groups: parameter groups of named parameters, which must be contiguous, fp32 and on one device.
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
        # For each group one buffer with the moments of all its parameters, each padded to whole blocks, so
        # that no block (and no scale) is shared by two parameters. Allocated at the first step, kept for the
        # whole run.
        self._moments: list[Moments] = []
        # For each group the kernel's table of parameter addresses and sizes (CUDA only).
        self._tables: list[Any] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            return loss  # a step that is left out: not even its counter changes
        self._allocate_moments()
        for number, group in enumerate(self.param_groups):
            self._step(number, group)
        return loss

    def _step(self, number: int, group: dict[str, Any]) -> None:
        # Counted per group, also for parameters that have no gradient in this step.
        group["step"] += 1
        beta1, beta2 = group["betas"]
        step = AdamStep(group["step"], group["lr"], (beta1, beta2), group["eps"], group["weight_decay"])
        parameters: list[Parameter] = group["params"]
        gradients = [None if p.grad is None else p.grad.contiguous() for p in parameters]
        if parameters[0].is_cuda:
            # Imported here because Triton may not be installed on machines without CUDA.
            from halfbyte.kernels.adamw_8bit import cuda

            if not self._tables:
                self._tables = [cuda.ParameterTable(each["params"]) for each in self.param_groups]
            table, moments = self._tables[number], self._moments[number]
            cuda.update(table, parameters, gradients, moments, step)
            return
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                own = Moments(**{name: self.state[parameter][name] for name in _FIELDS})
                adamw_8bit_reference.update(parameter, gradient, own, step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of `state_dict`.

        `Optimizer.load_state_dict` would cast the moments' bytes to the parameters' dtype, fp32. It therefore
        restores only the groups here, and the moments are copied into the group buffers.
        """
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        if not state_dict["state"]:
            return
        self._moments = []
        self._allocate_moments()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(parameters):
            for name in _FIELDS:
                self.state[parameter][name].copy_(state_dict["state"][number][name])

    def _allocate_moments(self) -> None:
        """Allocates the moments of all groups, unless they exist."""
        if not self._moments:
            self._moments = [self._group_moments(group["params"]) for group in self.param_groups]

    def _group_moments(self, parameters: list[Parameter]) -> Moments:
        """Allocates the moments of a group, and points the state of each parameter at its part of them."""
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
        first = 0  # first block of the parameter
        for parameter, count in zip(parameters, blocks, strict=True):
            # The values leave out the padding; the scales cover whole blocks.
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
