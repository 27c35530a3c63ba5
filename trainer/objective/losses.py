"""How far a prediction is from its target, one number a sample."""

from abc import abstractmethod
from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from halfbyte.trainer.registry import Registry, StatelessChoice


class Loss(StatelessChoice):
    """A distance, elementwise and averaged over a sample."""

    @abstractmethod
    def elementwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Both fp32 and of one shape -> the same shape."""

    def per_sample(self, prediction: Tensor, target: Tensor) -> Tensor:
        """prediction, target: (B, ...) of one shape, any dtype -> (B,) fp32.

        In fp32, because bf16's eight bits cannot hold the mean of a million squares.
        """
        assert prediction.shape == target.shape, f"{tuple(prediction.shape)} against {tuple(target.shape)}"
        return self.elementwise(prediction.float(), target.float()).flatten(1).mean(1)


LOSSES: Registry[Loss] = Registry("loss")


@LOSSES.register
class MSE(Loss):
    """The squared error; what FLUX and SD3 were trained with."""

    name: Literal["mse"]

    def elementwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target, reduction="none")


@LOSSES.register
class Huber(Loss):
    """Half the squared error up to `delta` and linear beyond: outliers pull less."""

    name: Literal["huber"]
    delta: float = Field(default=0.1, gt=0)
    """The error at which the loss turns from quadratic to linear."""

    def elementwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(prediction, target, reduction="none", delta=self.delta)


@LOSSES.register
class L1(Loss):
    """The absolute error."""

    name: Literal["l1"]

    def elementwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(prediction, target, reduction="none")
