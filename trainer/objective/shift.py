"""Timestep shifts: a larger image needs more noise to hide its content, so its sigmas move up.

Every shift computes s * sigma / (1 + (s - 1) * sigma), Esser et al. 2024 (arXiv 2403.03206), equation 23.
They differ in s.
"""

import math
from abc import abstractmethod
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from halfbyte.trainer.objective.timesteps import inside
from halfbyte.trainer.registry import Registry, StatelessChoice, conflict


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Returns s * sigma / (1 + (s - 1) * sigma) with s = `shift`, (B,) fp32 in (0, 1).

    Computed in float64, because in fp32 the distance of sigma from 1 loses its digits near pure noise.
    """
    sigma = sigma.double()
    return inside(shift * sigma / (1 + (shift - 1) * sigma))


class Shift(StatelessChoice):
    """A map of the sampled noise levels, which may depend on the image size."""

    @abstractmethod
    def apply(self, sigma: Tensor, image_tokens: int) -> Tensor:
        """Returns the shifted sigma (B,) fp32; sigma: (B,) fp32 in (0, 1); image_tokens: tokens per image."""


SHIFTS: Registry[Shift] = Registry("shift")


@SHIFTS.register
class NoShift(Shift):
    """Leaves the noise levels unchanged, as FLUX.1-schnell was trained."""

    name: Literal["none"]

    def apply(self, sigma: Tensor, image_tokens: int) -> Tensor:
        return sigma


@SHIFTS.register
class StaticShift(Shift):
    """The same shift for every image size; SD3 uses 3.0."""

    name: Literal["static"]
    shift: float = Field(default=3.0, gt=0)
    """1 changes nothing; above 1 moves the levels towards noise."""

    def apply(self, sigma: Tensor, image_tokens: int) -> Tensor:
        return shifted(sigma, self.shift)


@SHIFTS.register
class ResolutionShift(Shift):
    """A shift of exp(mu), where mu is linear in the number of image tokens; FLUX.1-dev uses this one."""

    # Computed here and not by diffusers' scheduler: with dynamic shifting, its training sigmas are not
    # shifted.
    name: Literal["resolution"]
    base_shift: float = 0.5
    """mu at `base_tokens`."""
    max_shift: float = 1.15
    """mu at `max_tokens`; the line continues beyond both points."""
    base_tokens: int = Field(default=256, ge=1)
    """Number of tokens of the smaller size: 256 is 256 x 256 pixels."""
    max_tokens: int = Field(default=4096, ge=1)
    """Number of tokens of the larger size: 4096 is 1024 x 1024 pixels."""

    @model_validator(mode="after")
    def _two_points_make_a_line(self) -> Self:
        if self.base_tokens >= self.max_tokens:
            expected = f"got {self.max_tokens}, expected more than base_tokens ({self.base_tokens})"
            raise conflict("max_tokens", expected)
        return self

    def mu(self, image_tokens: int) -> float:
        """Returns mu on the line through (base_tokens, base_shift) and (max_tokens, max_shift)."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return self.base_shift + slope * (image_tokens - self.base_tokens)

    def apply(self, sigma: Tensor, image_tokens: int) -> Tensor:
        return shifted(sigma, math.exp(self.mu(image_tokens)))

    def describe(self) -> str:
        """Describes the line, also as shifts, which can be compared with those of `static`."""
        return (
            f"resolution (mu {self.base_shift} at {self.base_tokens} tokens to {self.max_shift} at "
            f"{self.max_tokens}: shift {math.exp(self.base_shift):.2f} to {math.exp(self.max_shift):.2f})"
        )
