"""Loss weights by noise level, applied in addition to the density with which levels are sampled.

The formulas are from Esser et al. 2024 (arXiv 2403.03206), in the form that diffusers trains with.
"""

import math
from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from halfbyte.trainer.registry import Registry, StatelessChoice

# The lowest level of the 1000-step grids that other trainers sample from. Our levels are continuous, and the
# mean of sigma^-2 over them would be infinite: one sample near 0 would outweigh the rest of the run.
LOWEST_SIGMA = 1e-3


class Weighting(StatelessChoice):
    """A loss weight for each noise level."""

    @abstractmethod
    def weights(self, sigma: Tensor) -> Tensor:
        """Returns each sample's loss factor (B,) fp32; sigma: (B,) fp32 in (0, 1), after the shift."""


WEIGHTINGS: Registry[Weighting] = Registry("weighting")


@WEIGHTINGS.register
class NoWeighting(Weighting):
    """The same weight for every noise level."""

    name: Literal["none"]

    def weights(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma, dtype=torch.float32)


@WEIGHTINGS.register
class SigmaSqrt(Weighting):
    """sigma^-2: low noise levels, which show fine detail, weigh by far the most.

    Levels below 0.001 count as 0.001.
    """

    name: Literal["sigma_sqrt"]

    def weights(self, sigma: Tensor) -> Tensor:
        return sigma.float().clamp(min=LOWEST_SIGMA) ** -2.0


@WEIGHTINGS.register
class CosMapWeighting(Weighting):
    """2 / (pi (1 - 2 sigma + 2 sigma^2)), the density of the cosine schedule: the middle weighs twice as much
    as the ends."""

    name: Literal["cosmap"]

    def weights(self, sigma: Tensor) -> Tensor:
        sigma = sigma.float()
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
