"""Which noise levels are trained, and how often: densities of sigma in (0, 1), where 1 is pure noise.

Each scheme is the inverse of a cumulative distribution, sigma = F^-1(u). The uniform u comes from outside,
keyed by seed and sample, so the schemes keep no state and a new one inherits exact resume. The densities are
those of Esser et al. 2024 (arXiv 2403.03206), section 3.1, whose t is our sigma.

diffusers' training scripts use such a density to index timesteps that run from noise to data, so their sigma
is one minus the drawn number: `logit_normal` with mean m here is their `--logit_mean=-m`. The others, and
mean 0, are symmetric and do not differ.
"""

import math
from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from halfbyte.trainer.registry import Registry, StatelessChoice

# The distance of fp32 numbers just below 1: nothing closer to an end is told apart from it.
NEAREST = 2.0**-24


def inside(sigma: Tensor) -> Tensor:
    """Rounds float64 levels to fp32 and keeps them off 0 and 1, where weights and logits are infinite."""
    return sigma.clamp(NEAREST, 1 - NEAREST).to(torch.float32)


class TimestepScheme(StatelessChoice):
    """A density of noise levels."""

    @abstractmethod
    def sigmas(self, u: Tensor) -> Tensor:
        """u: (B,) fp32 or float64, uniform in [0, 1] -> sigma: (B,) fp32, strictly between 0 and 1."""


TIMESTEPS: Registry[TimestepScheme] = Registry("timestep scheme")


@TIMESTEPS.register
class Uniform(TimestepScheme):
    """Every noise level equally often."""

    name: Literal["uniform"]

    def sigmas(self, u: Tensor) -> Tensor:
        return inside(u.double())


@TIMESTEPS.register
class LogitNormal(TimestepScheme):
    """The logistic function of a normal draw: the middle levels most often. SD3's and FLUX's usual choice."""

    name: Literal["logit_normal"]
    mean: float = 0.0
    """The centre before the logistic function; above 0 trains more on noise, below 0 more on detail."""
    std: float = Field(default=1.0, gt=0)
    """The spread before the logistic function; larger reaches further towards both ends."""

    def sigmas(self, u: Tensor) -> Tensor:
        return inside(torch.sigmoid(self.mean + self.std * torch.special.ndtri(u.double())))


# Esser et al. 2024, equation 20: f(u) is monotonic, so a distribution's inverse, only in this range.
MODE_SCALE_MAX = 2 / (math.pi - 2)


@TIMESTEPS.register
class Mode(TimestepScheme):
    """A heavy-tailed density with its mode in the middle: unlike logit_normal it still reaches both ends."""

    name: Literal["mode"]
    scale: float = Field(default=1.29, ge=-1, le=round(MODE_SCALE_MAX, 4))
    """How much the middle is preferred: 0 is uniform, below 0 prefers the ends."""

    def sigmas(self, u: Tensor) -> Tensor:
        u = u.double()
        return inside(1 - u - self.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u))


@TIMESTEPS.register
class CosMap(TimestepScheme):
    """The noise levels of the cosine schedule. The weighting of that name has the same effect on the loss:
    choose one of the two."""

    name: Literal["cosmap"]

    def sigmas(self, u: Tensor) -> Tensor:
        # 1 - 1 / (tan(pi u / 2) + 1), without the pole at u = 1.
        angle = math.pi / 2 * u.double()
        return inside(torch.sin(angle) / (torch.sin(angle) + torch.cos(angle)))
