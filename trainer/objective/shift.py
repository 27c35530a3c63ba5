"""Timestep shift: larger pictures need more noise before their content is gone, so their sigmas move up.

All of them compute s * sigma / (1 + (s - 1) * sigma), Esser et al. 2024 (arXiv 2403.03206), equation 23.
"""

import math
from abc import abstractmethod
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from halfbyte.trainer.objective.timesteps import inside
from halfbyte.trainer.registry import Registry, StatelessChoice, conflict


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """sigma: (B,) -> (B,) fp32 in (0, 1); computed in float64, as 1 - sigma loses its digits near noise."""
    sigma = sigma.double()
    return inside(shift * sigma / (1 + (shift - 1) * sigma))


class Shift(StatelessChoice):
    """A map of the drawn noise levels, by the picture's size or not."""

    @abstractmethod
    def apply(self, sigma: Tensor, image_tokens: int) -> Tensor:
        """sigma: (B,) fp32 in (0, 1); image_tokens: the denoiser's tokens of one picture -> (B,) fp32."""


SHIFTS: Registry[Shift] = Registry("shift")


@SHIFTS.register
class NoShift(Shift):
    """The noise levels as drawn; FLUX.1-schnell's own."""

    name: Literal["none"]

    def apply(self, sigma: Tensor, image_tokens: int) -> Tensor:
        return sigma


@SHIFTS.register
class StaticShift(Shift):
    """The same shift for every size; SD3's own is 3.0."""

    name: Literal["static"]
    shift: float = Field(default=3.0, gt=0)
    """1 changes nothing, above 1 moves towards noise."""

    def apply(self, sigma: Tensor, image_tokens: int) -> Tensor:
        return shifted(sigma, self.shift)


@SHIFTS.register
class ResolutionShift(Shift):
    """A shift of exp(mu), mu linear in the picture's tokens; FLUX.1-dev's own, computed here, because asking
    a scheduler with dynamic shifting for its training sigmas gives unshifted ones."""

    name: Literal["resolution"]
    base_shift: float = 0.5
    """mu at `base_tokens`."""
    max_shift: float = 1.15
    """mu at `max_tokens`; further out the line goes on."""
    base_tokens: int = Field(default=256, ge=1)
    """Tokens of the smaller size: 256 is 256 x 256 pixels."""
    max_tokens: int = Field(default=4096, ge=1)
    """Tokens of the larger size: 4096 is 1024 x 1024 pixels."""

    @model_validator(mode="after")
    def _two_points_make_a_line(self) -> Self:
        if self.base_tokens >= self.max_tokens:
            expected = f"got {self.max_tokens}, expected more than base_tokens ({self.base_tokens})"
            raise conflict("max_tokens", expected)
        return self

    def mu(self, image_tokens: int) -> float:
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return self.base_shift + slope * (image_tokens - self.base_tokens)

    def apply(self, sigma: Tensor, image_tokens: int) -> Tensor:
        return shifted(sigma, math.exp(self.mu(image_tokens)))

    def describe(self) -> str:
        """Names the shifts themselves too: they compare with the static one."""
        return (
            f"resolution (mu {self.base_shift} at {self.base_tokens} tokens to {self.max_shift} at "
            f"{self.max_tokens}: shift {math.exp(self.base_shift):.2f} to {math.exp(self.max_shift):.2f})"
        )
