"""What moves the adapters. State is counted in fp32 numbers a trained parameter."""

import contextlib
import io
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from prodigyopt import Prodigy as ProdigyOptimizer
from pydantic import Field
from schedulefree import AdamWScheduleFree
from torch.nn import Parameter

from halfbyte.kernels.adamw_8bit.reference import BLOCK
from halfbyte.trainer.adapters.saved import MAGNITUDE
from halfbyte.trainer.optim.adamw_8bit import AdamW8bit
from halfbyte.trainer.optim.averages import OptimizerAverage, TrainedWeights
from halfbyte.trainer.optim.joined import JoinedOptimizer, all_in_one, by_shape
from halfbyte.trainer.registry import Choice, Registry

Shapes = Sequence[tuple[int, ...]]  # of the trained parameters


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes on the device."""

    state: int
    """Kept from step to step."""
    working: int
    """Taken within a step and given back."""


Decay = Annotated[float, Field(ge=0, lt=1)]
PositiveDecay = Annotated[float, Field(gt=0, lt=1)]
Named = Iterable[tuple[str, Parameter]]


class OptimizerChoice(Choice):
    """An optimizer and its settings."""

    averages: ClassVar[bool] = False  # whether it keeps an average of the weights, which a user is to see

    lr: float = Field(default=1e-4, gt=0)
    """The learning rate after warm-up."""

    @abstractmethod
    def build(self, named_parameters: Named) -> torch.optim.Optimizer:
        """Over the trainable parameters, named, so that a checkpoint can match its state by name; see `_groups`."""

    @abstractmethod
    def memory(self, shapes: Shapes) -> OptimizerMemory:
        """What it takes on CUDA for trained parameters of these shapes."""

    def weights(
        self, parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer
    ) -> TrainedWeights:
        """Which weights are seen where nobody trains; `optimizer` is what `build` gave."""
        return TrainedWeights()

    def rate(self, optimizer: torch.optim.Optimizer) -> float:
        """The rate of the last step, for the metrics."""
        return float(optimizer.param_groups[0]["lr"])

    def advice(self) -> list[str]:
        """Warnings about settings that are allowed and seldom meant."""
        return []


OPTIMIZERS: Registry[OptimizerChoice] = Registry("optimizer")


@OPTIMIZERS.register
class AdamW(OptimizerChoice):
    """Adam with decoupled weight decay, torch's own; state: two numbers a parameter."""

    name: Literal["adamw"]
    weight_decay: float = Field(default=0.01, ge=0)
    """Each step shrinks A and B by lr times this; DoRA's lengths of rows stay."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.999)
    """How much of the running means of the gradient and of its square each step keeps."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the squared mean, against division by zero."""

    def build(self, named_parameters: Named) -> torch.optim.Optimizer:
        groups = _groups(named_parameters)
        optimizer = torch.optim.AdamW(
            groups,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            # One kernel for all adapters; on the CPU the plain loop is as fast at these sizes.
            fused=_on_cuda(groups),
        )
        # The fused kernel could divide by float16's loss scale itself, but gradients are clipped before it runs.
        optimizer._step_supports_amp_scaling = False
        return optimizer

    def memory(self, shapes: Shapes) -> OptimizerMemory:
        """Two means, and one kernel over all."""
        return OptimizerMemory(2 * FP32 * numbers(shapes), 0)


@OPTIMIZERS.register
class AdamW8Bit(AdamW):
    """AdamW with its state in 8 bits, in blocks of 256 with a scale each; state: two bytes a parameter, a quarter of
    AdamW's, and the same learning rate."""

    name: Literal["adamw_8bit"]  # type: ignore[assignment]

    def build(self, named_parameters: Named) -> torch.optim.Optimizer:
        return AdamW8bit(
            _groups(named_parameters),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )

    def memory(self, shapes: Shapes) -> OptimizerMemory:
        """Two bytes a number and two scales a block."""
        return OptimizerMemory(2 * (BLOCK + FP32) * in_blocks(shapes, BLOCK), 0)


@OPTIMIZERS.register
class Adafactor(OptimizerChoice):
    """Adam's second moment as the product of a row's and a column's mean, no first moment, torch's own; state: the
    rows and columns alone, next to nothing. lr is a plain rate as AdamW's, not relative to the weights' size unless
    that is above 1, as DoRA's lengths may be; at step t it is at most 1 / sqrt(t)."""

    name: Literal["adafactor"]
    weight_decay: float = Field(default=0.01, ge=0)
    """Each step shrinks A and B by lr times this; DoRA's lengths of rows stay."""
    beta2_decay: float = Field(default=-0.8, lt=0)
    """At step t the running means keep 1 - t to this power."""
    clip: float = Field(default=1.0, ge=1)
    """Where the updates of all matrices of one shape have a larger root mean square, they are scaled down to it."""

    def build(self, named_parameters: Named) -> torch.optim.Optimizer:
        return JoinedOptimizer(
            _groups(named_parameters),
            by_shape,
            lambda joined: torch.optim.Adafactor(
                joined,
                lr=self.lr,
                beta2_decay=self.beta2_decay,
                # The step is lr times the weights' root mean square, or times the second number where that is
                # smaller. By the paper's 1e-3 an adapter's B, which starts at zero, would move a thousand times
                # too slowly.
                eps=(None, 1.0),
                d=self.clip,
                weight_decay=self.weight_decay,
            ),
        )

    def memory(self, shapes: Shapes) -> OptimizerMemory:
        """The means; what the update of the largest stack passes through. Gradients are handed over to stacks."""
        means, largest = factored(shapes)
        return OptimizerMemory(FP32 * means, FP32 * 2 * largest)

    def rate(self, optimizer: torch.optim.Optimizer) -> float:
        """lr, up to the bound that Adafactor has at step t: 1 / sqrt(t)."""
        step = max((float(state["step"]) for state in optimizer.state.values()), default=1.0)
        return min(super().rate(optimizer), step**-0.5)


@OPTIMIZERS.register
class Prodigy(OptimizerChoice):
    """AdamW that estimates its own rate while it trains, by prodigyopt (MIT licence); state: four numbers a
    parameter, two and a little with slice_p 11. A constant or cosine schedule fits; the metrics show the estimate
    times lr."""

    name: Literal["prodigy"]
    lr: float = Field(default=1.0, gt=0)
    """A factor of the estimated rate: leave it at 1, and change d_coef where the estimate is too high or low."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Each step shrinks A and B by the rate times this; DoRA's lengths of rows stay."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.999)
    """How much of the running means of the gradient and of its square each step keeps."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the squared mean, against division by zero."""
    d_coef: float = Field(default=1.0, gt=0)
    """A factor of the estimate itself; 0.5 and 2 are usual."""
    d0: float = Field(default=1e-6, gt=0)
    """The first estimate, which should be too low."""
    growth_rate: float | None = Field(default=None, gt=1)
    """The most that a step may multiply the estimate by, such as 1.02; null: any."""
    bias_correction: bool = True
    """Adam's correction of the running means at the start."""
    safeguard_warmup: bool = True
    """Keep a warm-up of the rate out of the estimate, which would come out too high."""
    slice_p: int = Field(default=1, ge=1)
    """Estimate from every so many-th number alone: 11 halves the state for little."""

    def build(self, named_parameters: Named) -> torch.optim.Optimizer:
        return JoinedOptimizer(_groups(named_parameters), all_in_one, self._build)

    def _build(self, joined: list[dict[str, Any]]) -> torch.optim.Optimizer:
        # It prints that its weight decay is decoupled.
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer: torch.optim.Optimizer = ProdigyOptimizer(
                joined,
                lr=self.lr,
                betas=self.betas,
                eps=self.eps,
                weight_decay=self.weight_decay,
                use_bias_correction=self.bias_correction,
                safeguard_warmup=self.safeguard_warmup,
                d0=self.d0,
                d_coef=self.d_coef,
                growth_rate=float("inf") if self.growth_rate is None else self.growth_rate,
                slice_p=self.slice_p,
            )
        return optimizer

    def memory(self, shapes: Shapes) -> OptimizerMemory:
        """Two means, and of every slice_p-th number the start and a sum; within the step the gradients in a row, then
        instead of them a root."""
        count = numbers(shapes)
        return OptimizerMemory(FP32 * (2 * count + 2 * -(-count // self.slice_p)), FP32 * count)

    def rate(self, optimizer: torch.optim.Optimizer) -> float:
        """The estimate times lr."""
        group: dict[str, Any] = optimizer.param_groups[0]
        return float(group["d"]) * float(group["lr"])

    def advice(self) -> list[str]:
        """A rate that was meant for another optimizer."""
        if self.lr == 1.0:
            return []
        return [
            f"optimizer.lr: {self.lr:g} scales the rate that prodigy estimates by itself; 1 is usual, and"
            " optimizer.d_coef the setting to change"
        ]


@OPTIMIZERS.register
class ScheduleFreeAdamW(OptimizerChoice):
    """AdamW that averages its weights instead of lowering its rate, by schedulefree (Apache 2.0): no step need be
    the last. Samples, validation, checkpoints and exports have the average. State: two numbers a parameter."""

    averages = True

    name: Literal["schedule_free_adamw"]
    lr: float = Field(default=1e-3, gt=0)
    """The learning rate after warm-up, usually 1 to 10 times AdamW's."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Each step shrinks A and B by lr times this; DoRA's lengths of rows stay."""
    betas: Annotated[tuple[PositiveDecay, Decay], Field(strict=False)] = (0.9, 0.999)
    """How near to the average the gradient is taken, and how much of the running mean of its square a step keeps."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the squared mean, against division by zero."""

    def build(self, named_parameters: Named) -> torch.optim.Optimizer:
        optimizer = AdamWScheduleFree(
            _groups(named_parameters),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
        optimizer.train()
        return optimizer

    def memory(self, shapes: Shapes) -> OptimizerMemory:
        """The weights' other end and a mean; a root of it within the step."""
        return OptimizerMemory(2 * FP32 * numbers(shapes), FP32 * numbers(shapes))

    def weights(
        self, parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer
    ) -> TrainedWeights:
        """The average that the optimizer keeps."""
        return OptimizerAverage(parameters, optimizer)


def _groups(named_parameters: Named) -> list[dict[str, Any]]:
    """What decays, and the lengths of DoRA's rows: those are the base's own, and no decay is to shrink it."""
    named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    assert named, "no trainable parameters"
    lengths = [item for item in named if MAGNITUDE in item[0]]
    groups: list[dict[str, Any]] = [{"params": [item for item in named if MAGNITUDE not in item[0]]}]
    return [*groups, {"params": lengths, "weight_decay": 0.0}] if lengths else groups


def _on_cuda(groups: list[dict[str, Any]]) -> bool:
    return all(parameter.is_cuda for group in groups for _, parameter in group["params"])


FP32 = 4  # bytes


def numbers(shapes: Shapes) -> int:
    """How many parameters there are."""
    return sum(math.prod(shape) for shape in shapes)


def in_blocks(shapes: Shapes, block: int) -> int:
    """How many blocks hold them, each parameter's padded to whole ones."""
    return sum(-(-math.prod(shape) // block) for shape in shapes)


def factored(shapes: Shapes) -> tuple[int, int]:
    """Parameters stacked by shape: the numbers in the rows' and columns' means, each of a vector's, and those in the
    largest stack."""
    means, largest = 0, 0
    for shape, count in Counter(shapes).items():
        *outer, rows, columns = (count, *shape) if len(shape) > 1 else (count, *shape, 0)
        means += math.prod(outer) * (rows + columns)
        largest = max(largest, count * math.prod(shape))
    return means, largest
