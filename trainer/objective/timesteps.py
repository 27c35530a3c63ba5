"""Timestep schemes: the densities with which noise levels sigma in (0, 1) are sampled; 1 is pure noise.

Each scheme is the inverse of a cumulative distribution, sigma = F^-1(u). The caller draws the uniform u from
the seed and the sample's number. The schemes therefore have no state, and exact resume works for every new
one. The densities are from Esser et al. 2024 (arXiv 2403.03206), section 3.1; the paper's t is our sigma.

diffusers' training scripts use such a density to index timesteps that run from noise to data, so their sigma
is one minus the drawn number: `logit_normal` with mean m here is their `--logit_mean=-m`. The other schemes,
and mean 0, are symmetric, so they are the same in both.
"""

import math
from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from halfbyte.trainer.registry import Registry, StatelessChoice

# The spacing of fp32 numbers just below 1. A sigma closer to 1 than this would round to 1.
NEAREST = 2.0**-24


def inside(sigma: Tensor) -> Tensor:
    """Clamps float64 levels away from 0 and 1, where weights and logits are infinite; rounds to fp32."""
    return sigma.clamp(NEAREST, 1 - NEAREST).to(torch.float32)


class TimestepScheme(StatelessChoice):
    """A density of noise levels, given by the inverse of its cumulative distribution."""

    @abstractmethod
    def sigmas(self, u: Tensor) -> Tensor:
        """Maps u (B,), uniform in [0, 1], fp32 or float64, to sigma (B,) fp32, strictly between 0 and 1."""


TIMESTEPS: Registry[TimestepScheme] = Registry("timestep scheme")


@TIMESTEPS.register
class Uniform(TimestepScheme):
    """Every noise level with the same probability."""

    name: Literal["uniform"]

    def sigmas(self, u: Tensor) -> Tensor:
        return inside(u.double())


@TIMESTEPS.register
class LogitNormal(TimestepScheme):
    """The logistic function of a normal variable: middle levels are most frequent. Usual for SD3 and FLUX."""

    name: Literal["logit_normal"]
    mean: float = 0.0
    """Mean of the normal variable; above 0 trains more on noise, below 0 more on detail."""
    std: float = Field(default=1.0, gt=0)
    """Standard deviation of the normal variable; a larger value reaches further towards both ends."""

    def sigmas(self, u: Tensor) -> Tensor:
        return inside(torch.sigmoid(self.mean + self.std * torch.special.ndtri(u.double())))


# Esser et al. 2024, equation 20: only up to this scale is f(u) monotonic, as the inverse of a distribution
# must be.
MODE_SCALE_MAX = 2 / (math.pi - 2)


@TIMESTEPS.register
class Mode(TimestepScheme):
    """A heavy-tailed density with its mode in the middle. Unlike logit_normal, it reaches both ends."""

    name: Literal["mode"]
    scale: float = Field(default=1.29, ge=-1, le=round(MODE_SCALE_MAX, 4))
    """Preference for the middle: 0 is uniform, below 0 prefers the ends."""

    def sigmas(self, u: Tensor) -> Tensor:
        u = u.double()
        return inside(1 - u - self.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u))


@TIMESTEPS.register
class CosMap(TimestepScheme):
    """The noise levels of the cosine schedule. The weighting `cosmap` has the same effect on the loss: use
    only one of the two."""

    name: Literal["cosmap"]

    def sigmas(self, u: Tensor) -> Tensor:
        # Equal to the paper's 1 - 1 / (tan(pi u / 2) + 1), without the pole at u = 1.
        angle = math.pi / 2 * u.double()
        return inside(torch.sin(angle) / (torch.sin(angle) + torch.cos(angle)))
