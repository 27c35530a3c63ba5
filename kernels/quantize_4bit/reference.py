"""The 4-bit block format in plain torch: the definition that every kernel is tested against.

A weight is read as one flat row-major sequence, so blocks may cross rows and the last block may be short.
Each block of `blocksize` values is divided by its absmax. Every value is replaced by the index (code) of the
nearest of 16 table entries. Two codes are packed per byte, the even element in the high nibble:

    weight[i] ~ code_table[code[i]] * absmax[i // blocksize]

Double quantization stores the absmax values in 8 bits too. Their mean (offset) is subtracted;
then blocks of `nested_blocksize` of them get the dynamic code of Dettmers, "8-bit Approximations
for Parallelism in Deep Learning" (arXiv:1511.04561):

    absmax[b] ~ nested_table[nested_code[b]] * nested_absmax[b // nested_blocksize] + offset

NF4 is from "QLoRA" (arXiv:2305.14314). The order of roundings is bitsandbytes', so that its files hold the
same weights here.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

# fmt: off
NF4_CODE = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # (16,) fp32, ascending
_FP4_MAGNITUDES = [0.0, 0.0052083335, 0.6666667, 1.0, 0.33333334, 0.5, 0.16666667, 0.25]  # of codes 0 to 7
FP4_CODE = torch.tensor(_FP4_MAGNITUDES + [-value for value in _FP4_MAGNITUDES])  # (16,) fp32; bit 3: sign
# fmt: on

# A value above a boundary gets the upper code. A value equal to it gets the lower one.
NF4_BOUNDARIES = (NF4_CODE[:-1] + NF4_CODE[1:]) / 2  # (15,) fp32
# Boundaries of |x|: the constants of bitsandbytes' CUDA kernel. Most differ from the fp32 midpoints, by up to
# 4e-7.  bitsandbytes' CPU code compares with the midpoints instead, and gives small negative values the code
# of +0 where its CUDA kernel gives -0. So both disagree on values that are halfway between two table entries
# up to rounding. Random fp32 values are never that close; of bf16 values about 1 in 1,000 is 5/6, 7/12, 5/12,
# ... of its block's absmax. Neither choice is more accurate: the errors differ by less than 1e-6 of the
# absmax. We follow CUDA, where models are usually quantized.
FP4_BOUNDARIES = torch.tensor([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333])
_FP4_ASCENDING = torch.tensor([0, 1, 6, 7, 4, 5, 2, 3], dtype=torch.uint8)  # codes by rising magnitude
_FP4_SIGN = 8

# Floor of an absmax before its reciprocal, which stays finite: blocks of zeros stay zeros.
_SMALLEST_SCALE = 1e-38


def _dynamic_code() -> Tensor:
    """Returns the 8-bit dynamic code: seven decades, the e-th with 2**e values of each sign, plus 0 and 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        positive = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        values += positive.tolist() + (-positive).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


DYNAMIC_CODE = _dynamic_code()  # (256,) fp32, ascending; entry 127 is zero
DYNAMIC_BOUNDARIES = (DYNAMIC_CODE[:-1] + DYNAMIC_CODE[1:]) / 2  # (255,) fp32

CODES = {"nf4": NF4_CODE, "fp4": FP4_CODE}


@functools.cache
def on_device(name: str, device: torch.device) -> Tensor:
    """Returns this module's table `name` on `device`; copies it there once."""
    table: Tensor = globals()[name]
    # A tensor created in inference mode could not be saved for a later backward.
    with torch.inference_mode(False):
        return table.to(device)


def _blocks(flat: Tensor, blocksize: int) -> Tensor:
    """Reshapes (n,) to (ceil(n / blocksize), blocksize), padded with zeros, which do not change an absmax."""
    missing = -flat.numel() % blocksize
    if missing:
        flat = torch.nn.functional.pad(flat, (0, missing))
    return flat.view(-1, blocksize)


def _nearest_4bit(scaled: Tensor, quant_type: str) -> Tensor:
    """Returns the codes (n,) uint8 nearest to values (n,) fp32 in [-1, 1]."""
    if quant_type == "nf4":
        boundaries = on_device("NF4_BOUNDARIES", scaled.device)
        return torch.bucketize(scaled, boundaries, out_int32=True).to(torch.uint8)
    boundaries = on_device("FP4_BOUNDARIES", scaled.device)
    # FP4 is symmetric: search by magnitude, then set the sign bit.
    order = torch.bucketize(scaled.abs(), boundaries, out_int32=True)
    return on_device("_FP4_ASCENDING", scaled.device)[order] + _FP4_SIGN * (scaled < 0).to(torch.uint8)


def quantize_4bit(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantizes a weight of any shape with n elements in fp32, fp16 or bf16.

    Returns (packed, absmax): uint8 ((n + 1) // 2, 1) and fp32 (ceil(n / blocksize),). If n is odd, the last
    nibble is the code of zero. A block of zeros has absmax 0 and the codes of zero.
    """
    numel = weight.numel()
    blocks = _blocks(weight.reshape(-1).float(), blocksize)
    absmax = blocks.abs().amax(dim=1)
    # One reciprocal per block and one product per value, like the CUDA kernel.
    # A division would round differently.
    scaled = (blocks * (1.0 / absmax.clamp(min=_SMALLEST_SCALE)).unsqueeze(1)).clamp(-1, 1)
    codes = _nearest_4bit(scaled.view(-1), quant_type)
    # Fill the last byte. Only odd block sizes need this; otherwise the padding
    # of the last block already fills it.
    if numel % 2 and numel == codes.numel():
        codes = torch.cat([codes, _nearest_4bit(scaled.new_zeros(1), quant_type)])
    codes = codes[: numel + numel % 2]
    return ((codes[0::2] << 4) | codes[1::2]).unsqueeze(1), absmax


def quantize_absmax(absmax: Tensor, nested_blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes the absmax values (b,) fp32 of a weight to 8 bits.

    Returns (codes, nested_absmax, offset): uint8 (b,), fp32 (ceil(b / nested_blocksize),) and fp32 ().
    """
    offset = absmax.mean()
    # With absmax values near fp32's maximum the sum overflows although the mean does not.
    offset = torch.where(offset.isfinite(), offset, absmax.mean(dtype=torch.float64).float())
    blocks = _blocks(absmax - offset, nested_blocksize)
    nested_absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / nested_absmax.clamp(min=_SMALLEST_SCALE)).unsqueeze(1)).clamp(-1, 1)
    boundaries = on_device("DYNAMIC_BOUNDARIES", absmax.device)
    codes = torch.bucketize(scaled.view(-1), boundaries, out_int32=True).to(torch.uint8)
    return codes[: absmax.numel()], nested_absmax, offset


def dequantize_absmax(
    codes: Tensor, nested_absmax: Tensor, offset: Tensor, nested_code: Tensor, nested_blocksize: int
) -> Tensor:
    """Returns the absmax values (b,) fp32 of a double-quantized weight.

    Product and sum are rounded separately. A fused multiply-add would give different weights.
    """
    scale = nested_absmax.repeat_interleave(nested_blocksize)[: codes.numel()]
    return nested_code[codes.int()] * scale + offset


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, code: Tensor, shape: Sequence[int], dtype: torch.dtype, blocksize: int
) -> Tensor:
    """Returns the weight of `shape`: table value times absmax in fp32, rounded once to `dtype`."""
    numel = 1
    for size in shape:
        numel *= size
    flat = packed.reshape(-1)
    codes = torch.stack([flat >> 4, flat & 0xF], dim=1).view(-1)[:numel]
    scale = absmax.repeat_interleave(blocksize)[:numel]
    return (code[codes.int()] * scale).to(dtype).view(list(shape))
