"""What moves the adapters."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch.nn import Parameter

from halfbyte.trainer.registry import Choice, Registry

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerChoice(Choice):
    """An optimizer and its settings."""

    lr: float = Field(default=1e-4, gt=0)
    """The learning rate after warm-up."""

    @abstractmethod
    def build(self, named_parameters: Iterable[tuple[str, Parameter]]) -> torch.optim.Optimizer:
        """One group of the trainable parameters, named, so that a checkpoint can match its state by name."""


OPTIMIZERS: Registry[OptimizerChoice] = Registry("optimizer")


@OPTIMIZERS.register
class AdamW(OptimizerChoice):
    """Adam with decoupled weight decay, torch's own; two fp32 numbers of state a parameter."""

    name: Literal["adamw"]
    weight_decay: float = Field(default=0.01, ge=0)
    """Each step shrinks the adapters by lr times this."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.999)
    """How much of the running means of the gradient and of its square each step keeps."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the squared mean, against division by zero."""

    def build(self, named_parameters: Iterable[tuple[str, Parameter]]) -> torch.optim.Optimizer:
        named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        assert named, "no trainable parameters"
        return torch.optim.AdamW(
            named,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            # One kernel for all adapters; on the CPU the plain loop is as fast at these sizes.
            fused=all(parameter.is_cuda for _, parameter in named),
        )
