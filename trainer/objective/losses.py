"""Loss functions: the distance between prediction and target, one number per sample."""

from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from halfbyte.trainer.registry import Registry, StatelessChoice


class Loss(StatelessChoice):
    """An elementwise distance, averaged over each sample."""

    @abstractmethod
    def elementwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Returns the distance of each element. All tensors are fp32 and of one shape."""

    def per_sample(self, prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Returns the mean distance of each sample, (B,) fp32; with weights sum(w e) / sum(w) over its elements.

        The sum of the weights is the divisor, so that a small masked area counts as much as a whole image. A
        sample whose weights are all 0 has the loss 0.

        prediction, target: (B, ...) of one shape, any dtype. Computed in fp32, because bf16's 8 bits of
        precision are too few for the mean of a million squares. weight: broadcast to that shape, 0 or more.
        """
        assert prediction.shape == target.shape, f"{tuple(prediction.shape)} against {tuple(target.shape)}"
        distance = self.elementwise(prediction.float(), target.float())
        if weight is None:
            return distance.flatten(1).mean(1)
        weight = weight.expand_as(distance)
        total = weight.flatten(1).sum(1)
        # Where the total is 0, so is the numerator: dividing by 1 gives 0 and a gradient of 0.
        return (distance * weight).flatten(1).sum(1) / torch.where(total > 0, total, torch.ones_like(total))


LOSSES: Registry[Loss] = Registry("loss")


@LOSSES.register
class MSE(Loss):
    """The squared error, with which FLUX and SD3 were trained."""

    name: Literal["mse"]

    def elementwise(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target, reduction="none")


@LOSSES.register
class Huber(Loss):
    """Half the squared error up to `delta`, linear beyond it: outliers count less."""

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
