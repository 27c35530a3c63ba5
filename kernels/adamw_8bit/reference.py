"""AdamW with 8-bit moments in plain torch: the definition, and the CPU path.

A moment is stored in blocks of 256 values along the flat parameter. Each value is code * absmax of the block,
with the dynamic codes of Dettmers et al. 2022 ("8-bit Optimizers via Block-wise Quantization"): about three
binary digits over seven decades. A step decodes the moments, computes in fp32 and encodes them again. The
weights are updated with the fp32 moments, before these are rounded:

    m = beta1 m + (1 - beta1) g         v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr * decay) - (lr / c1) m / (sqrt(v) / sqrt(c2) + eps),    c_i = 1 - beta_i^step

One difference from the paper: there v may round to 0 while m does not, and the next step then moves the
weight by m / eps. Here a stored v is at least the smallest code above zero.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from halfbyte.kernels.quantize_4bit.reference import DYNAMIC_CODE

BLOCK = 256  # values that share a scale


@dataclass(frozen=True)
class Moments:
    """The quantized state of one parameter with n values, or of several in a row; blocks = ceil(n / 256)."""

    mean: Tensor  # (n,) uint8, codes of m
    mean_scale: Tensor  # (blocks,) fp32, absmax of m
    square: Tensor  # (n,) uint8, codes of v
    square_scale: Tensor  # (blocks,) fp32, absmax of v


@dataclass(frozen=True)
class AdamStep:
    """The hyperparameters of one step; `step` counts from 1."""

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    @property
    def corrections(self) -> tuple[float, float]:
        """The bias corrections (c1, c2): divisors of the moments, which both start at zero."""
        return 1 - self.betas[0] ** self.step, 1 - self.betas[1] ** self.step


def update(parameter: Tensor, gradient: Tensor, moments: Moments, step: AdamStep) -> None:
    """Updates `parameter` (fp32, contiguous) and `moments` in place; `gradient` has the parameter's shape."""
    beta1, beta2 = step.betas
    correction1, correction2 = step.corrections
    mean_codes, square_codes = codes(parameter.device)
    g = gradient.reshape(-1)
    mean = beta1 * _read(moments.mean, moments.mean_scale, mean_codes) + (1 - beta1) * g
    square = beta2 * _read(moments.square, moments.square_scale, square_codes) + (1 - beta2) * g * g
    denominator = square.sqrt() / correction2**0.5 + step.eps
    weights = parameter.view(-1)
    weights.mul_(1 - step.lr * step.weight_decay).addcdiv_(mean, denominator, value=-step.lr / correction1)
    _write(mean, moments.mean, moments.mean_scale, mean_codes)
    _write(square, moments.square, moments.square_scale, square_codes, least=1)


@functools.cache
def codes(device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the code tables of the first and second moment on a device, each (256,) fp32, ascending."""
    positive = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        # The second moment has no sign, so each decade gets twice as many codes.
        edges = torch.linspace(0.1, 1, 2 ** (exponent + 1) + 1, dtype=torch.float32)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10 ** (exponent - 6))
    return DYNAMIC_CODE.to(device), torch.cat(positive).sort().values.to(device)


def _read(quantized: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """Decodes a moment (n,) uint8 to fp32: table value times the block's absmax."""
    return table[quantized.int()] * scale.repeat_interleave(BLOCK)[: quantized.numel()]


def _write(values: Tensor, quantized: Tensor, scale: Tensor, table: Tensor, least: int = 0) -> None:
    """Encodes fp32 values (n,) into `quantized` and `scale`: the nearest code, but none below `least`.

    A value halfway between two codes gets the lower one.
    """
    blocks = F.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    scaled = blocks / largest.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    boundaries = (table[:-1] + table[1:]) / 2
    nearest = torch.bucketize(scaled, boundaries).clamp_min(least).view(-1)[: values.numel()]
    quantized.copy_(nearest)
    scale.copy_(largest)
