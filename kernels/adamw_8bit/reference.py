"""AdamW with its two moments in 8 bits, in plain torch: the definition of right, and the CPU's path.

Moments are held in blocks of 256 along the flat parameter, as code * (the block's largest magnitude), with the
dynamic codes of Dettmers et al. 2022 (8-bit Optimizers via Block-wise Quantization): about three binary digits over
seven decades. Each step reads them, computes in fp32 and writes them again; the weights move by the fp32 moments.
There the second moment may round to zero under a first one that does not, which then moves the weight by its ratio to
eps: here it takes at least the smallest code above zero.
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
    """The state of a parameter of n values, or of several in a row; blocks = ceil(n / 256)."""

    mean: Tensor  # (n,) uint8
    mean_scale: Tensor  # (blocks,) fp32
    square: Tensor  # (n,) uint8
    square_scale: Tensor  # (blocks,) fp32


@dataclass(frozen=True)
class AdamStep:
    """The numbers of one step, counted from 1."""

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    @property
    def corrections(self) -> tuple[float, float]:
        """What the moments are divided by, since both start at zero."""
        return 1 - self.betas[0] ** self.step, 1 - self.betas[1] ** self.step


def update(parameter: Tensor, gradient: Tensor, moments: Moments, step: AdamStep) -> None:
    """Moves `parameter` (fp32, contiguous) and `moments`, in place, by `gradient` of its shape."""
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
    """The values of the codes of the first and second moment on a device, each (256,) fp32, ascending."""
    positive = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        # Without a sign each decade has twice the digits.
        edges = torch.linspace(0.1, 1, 2 ** (exponent + 1) + 1, dtype=torch.float32)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10 ** (exponent - 6))
    return DYNAMIC_CODE.to(device), torch.cat(positive).sort().values.to(device)


def _read(quantized: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    return table[quantized.int()] * scale.repeat_interleave(BLOCK)[: quantized.numel()]


def _write(values: Tensor, quantized: Tensor, scale: Tensor, table: Tensor, least: int = 0) -> None:
    """Each value takes the nearest code, the lower one halfway, but none below `least`."""
    blocks = F.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    scaled = blocks / largest.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    boundaries = (table[:-1] + table[1:]) / 2
    nearest = torch.bucketize(scaled, boundaries).clamp_min(least).view(-1)[: values.numel()]
    quantized.copy_(nearest)
    scale.copy_(largest)
