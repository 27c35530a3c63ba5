"""The optimizers that a recipe can choose, with their settings and their memory.

"State" in the descriptions is the optimizer's memory, in fp32 values per trained parameter.
"""

import contextlib
import io
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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

Shapes = Sequence[tuple[int, ...]]  # shapes of the trained parameters


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes that an optimizer uses on the device."""

    state: int
    """Kept between steps."""
    working: int
    """Allocated and freed within a step."""


Decay = Annotated[float, Field(ge=0, lt=1)]
PositiveDecay = Annotated[float, Field(gt=0, lt=1)]
Named = Iterable[tuple[str, Parameter]]


class OptimizerChoice(Choice):
    """An optimizer and its settings."""

    averages: ClassVar[bool] = False  # True if it keeps an average of the weights, which users then see

    lr: float = Field(default=1e-4, gt=0)
    """Learning rate after warm-up."""

    @abstractmethod
    def build(self, named_parameters: Named) -> torch.optim.Optimizer:
        """Builds the optimizer over the trainable parameters.

        They are named so that a checkpoint can match the state by name; see `_groups`.
        """

    @abstractmethod
    def memory(self, shapes: Shapes) -> OptimizerMemory:
        """Returns the memory that it uses on CUDA for trained parameters of these shapes."""

    def weights(
        self, parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer
    ) -> TrainedWeights:
        """Returns the weights that samples, validation and exports use; `optimizer` is the result of `build`."""
        return TrainedWeights()

    def rate(self, optimizer: torch.optim.Optimizer) -> float:
        """Returns the learning rate of the last step, for the metrics."""
        return float(optimizer.param_groups[0]["lr"])

    def advice(self) -> list[str]:
        """Returns warnings about settings that are valid but rarely intended."""
        return []


OPTIMIZERS: Registry[OptimizerChoice] = Registry("optimizer")


@OPTIMIZERS.register
class AdamW(OptimizerChoice):
    """Adam with decoupled weight decay (torch's implementation). State: two values per parameter."""

    name: Literal["adamw"]
    weight_decay: float = Field(default=0.01, ge=0)
    """Each step shrinks A and B by lr times this. DoRA's magnitudes do not decay."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.999)
    """Shares that each step keeps of the running means of the gradient and of its square."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment, to avoid division by zero."""

    def build(self, named_parameters: Named) -> torch.optim.Optimizer:
        groups = _groups(named_parameters)
        optimizer = torch.optim.AdamW(
            groups,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            # On CUDA one kernel updates all adapters. On the CPU the plain loop is as fast at these sizes.
            fused=_on_cuda(groups),
        )
        # torch's fused kernel can divide gradients by float16's loss scale itself, and GradScaler would then
        # leave them scaled. They must be unscaled earlier, because they are clipped before the step.
        optimizer._step_supports_amp_scaling = False
        return optimizer

    def memory(self, shapes: Shapes) -> OptimizerMemory:
        """Returns the memory of the two moments; the fused kernel needs no working memory."""
        return OptimizerMemory(2 * FP32 * numbers(shapes), 0)


@OPTIMIZERS.register
class AdamW8Bit(AdamW):
    """AdamW with 8-bit state: one scale per block of 256 values. State: two bytes per parameter, a quarter of
    AdamW's. Use AdamW's learning rate."""

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
        """Returns the memory of two bytes per value and two fp32 scales per block."""
        return OptimizerMemory(2 * (BLOCK + FP32) * in_blocks(shapes, BLOCK), 0)


@OPTIMIZERS.register
class Adafactor(OptimizerChoice):
    """Adafactor (torch's implementation): Adam's second moment as the product of a row mean and a column
    mean, and no first moment. State: only the row and column means, almost nothing. lr is a plain rate as in
    AdamW; it is relative to the weights' root mean square only where that is above 1, as DoRA's magnitudes
    may be. At step t the rate is at most 1 / sqrt(t)."""

    name: Literal["adafactor"]
    weight_decay: float = Field(default=0.01, ge=0)
    """Each step shrinks A and B by lr times this. DoRA's magnitudes do not decay."""
    beta2_decay: float = Field(default=-0.8, lt=0)
    """At step t the running means keep the share 1 - t**beta2_decay of their old value."""
    clip: float = Field(default=1.0, ge=1)
    """Upper bound of the updates' root mean square over all matrices of one shape; larger updates are scaled
    down."""

    def build(self, named_parameters: Named) -> torch.optim.Optimizer:
        return JoinedOptimizer(
            _groups(named_parameters),
            by_shape,
            lambda joined: torch.optim.Adafactor(
                joined,
                lr=self.lr,
                beta2_decay=self.beta2_decay,
                # Adafactor's step is lr * max(eps[1], RMS(weights)). With the paper's eps[1] of 1e-3, an
                # adapter's B, which starts at zero, would move a thousand times too slowly; 1.0 makes lr a
                # plain rate.
                eps=(None, 1.0),
                d=self.clip,
                weight_decay=self.weight_decay,
            ),
        )

    def memory(self, shapes: Shapes) -> OptimizerMemory:
        """Returns the memory of the means; within a step, two temporaries of the largest stack's size.

        The joined gradients do not count: they replace the separate ones.
        """
        means, largest = factored(shapes)
        return OptimizerMemory(FP32 * means, FP32 * 2 * largest)

    def rate(self, optimizer: torch.optim.Optimizer) -> float:
        """Returns min(lr, 1 / sqrt(t)), the rate that Adafactor uses at step t."""
        step = max((float(state["step"]) for state in optimizer.state.values()), default=1.0)
        return min(super().rate(optimizer), step**-0.5)


@OPTIMIZERS.register
class Prodigy(OptimizerChoice):
    """AdamW that estimates its own learning rate during training (prodigyopt, MIT license). State: four
    values per parameter, or about 2.2 with slice_p: 11. Use a constant or cosine schedule. The metrics show
    the estimate times lr."""

    name: Literal["prodigy"]
    lr: float = Field(default=1.0, gt=0)
    """Factor of the estimated rate. Leave it at 1; if the estimate is too high or too low, change d_coef."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Each step shrinks A and B by the rate times this. DoRA's magnitudes do not decay."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.999)
    """Shares that each step keeps of the running means of the gradient and of its square."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment, to avoid division by zero."""
    d_coef: float = Field(default=1.0, gt=0)
    """Factor of the estimate itself; usual values are 0.5 to 2."""
    d0: float = Field(default=1e-6, gt=0)
    """The first estimate; it should be too low."""
    growth_rate: float | None = Field(default=None, gt=1)
    """Largest factor by which one step may raise the estimate, such as 1.02; null for no limit."""
    bias_correction: bool = True
    """Correct the bias of Adam's running means, which start at zero."""
    safeguard_warmup: bool = True
    """Keep the learning-rate warm-up out of the estimate, which would otherwise be too high."""
    slice_p: int = Field(default=1, ge=1)
    """Estimate the rate from every n-th value only: 11 almost halves the state at little cost."""

    def build(self, named_parameters: Named) -> torch.optim.Optimizer:
        return JoinedOptimizer(_groups(named_parameters), all_in_one, self._build)

    def _build(self, joined: list[dict[str, Any]]) -> torch.optim.Optimizer:
        # prodigyopt prints a line about decoupled weight decay to stdout.
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
        """Returns the memory of two moments, and of the start value and a sum for every slice_p-th value.

        Within a step the joined gradients exist, and after them the root of the second moment in the same
        size.
        """
        count = numbers(shapes)
        return OptimizerMemory(FP32 * (2 * count + 2 * -(-count // self.slice_p)), FP32 * count)

    def rate(self, optimizer: torch.optim.Optimizer) -> float:
        """Returns the estimate times lr."""
        group: dict[str, Any] = optimizer.param_groups[0]
        return float(group["d"]) * float(group["lr"])

    def advice(self) -> list[str]:
        """Warns about an lr that was probably meant for another optimizer."""
        if self.lr == 1.0:
            return []
        return [
            f"optimizer.lr: got {self.lr:g}, which scales the rate that prodigy estimates; use 1, and set"
            " optimizer.d_coef to change the estimate"
        ]


@OPTIMIZERS.register
class ScheduleFreeAdamW(OptimizerChoice):
    """AdamW that averages its weights instead of lowering its learning rate (schedulefree, Apache 2.0), so
    training can stop at any step. Samples, validation, checkpoints and exports use the average. State: two
    values per parameter."""

    averages = True

    name: Literal["schedule_free_adamw"]
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate after warm-up, usually 1 to 10 times AdamW's."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Each step shrinks A and B by lr times this. DoRA's magnitudes do not decay."""
    betas: Annotated[tuple[PositiveDecay, Decay], Field(strict=False)] = (0.9, 0.999)
    """First value: how close to the average the gradient is computed. Second: the share of the running mean
    of the squared gradient that each step keeps."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment, to avoid division by zero."""

    def build(self, named_parameters: Named) -> torch.optim.Optimizer:
        optimizer = _ScheduleFreeAdamW(
            _groups(named_parameters),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
        optimizer.train()
        return optimizer

    def memory(self, shapes: Shapes) -> OptimizerMemory:
        """Returns the memory of the sequence z and the second moment; within a step also its root."""
        return OptimizerMemory(2 * FP32 * numbers(shapes), FP32 * numbers(shapes))

    def weights(
        self, parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer
    ) -> TrainedWeights:
        """Returns the average that the optimizer keeps."""
        return OptimizerAverage(parameters, optimizer)


class _ScheduleFreeAdamW(AdamWScheduleFree):  # type: ignore[misc]
    """The library's optimizer, except that a step without any gradient does not count: it is left out."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(parameter.grad is not None for group in self.param_groups for parameter in group["params"]):
            super().step()
        return loss


def _groups(named_parameters: Named) -> list[dict[str, Any]]:
    """Returns one group for A and B, and one without weight decay for DoRA's magnitudes, if there are any.

    Magnitudes start at the norms of the base's rows, so decay towards zero would shrink the base.
    """
    named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    assert named, "no trainable parameters"
    magnitudes = [item for item in named if MAGNITUDE in item[0]]
    groups: list[dict[str, Any]] = [{"params": [item for item in named if MAGNITUDE not in item[0]]}]
    return [*groups, {"params": magnitudes, "weight_decay": 0.0}] if magnitudes else groups


def _on_cuda(groups: list[dict[str, Any]]) -> bool:
    return all(parameter.is_cuda for group in groups for _, parameter in group["params"])


FP32 = 4  # bytes


def numbers(shapes: Shapes) -> int:
    """Returns the number of values in parameters of these shapes."""
    return sum(math.prod(shape) for shape in shapes)


def in_blocks(shapes: Shapes, block: int) -> int:
    """Returns the number of blocks that hold the parameters, each padded to whole blocks."""
    return sum(-(-math.prod(shape) // block) for shape in shapes)


def factored(shapes: Shapes) -> tuple[int, int]:
    """Returns the values in Adafactor's row and column means, and in the largest stack of equal shapes.

    Vectors have no rows and columns, and one mean per value.
    """
    means, largest = 0, 0
    for shape, count in Counter(shapes).items():
        *outer, rows, columns = (count, *shape) if len(shape) > 1 else (count, *shape, 0)
        means += math.prod(outer) * (rows + columns)
        largest = max(largest, count * math.prod(shape))
    return means, largest
