"""4-bit blocks whose scale has the least squared error, instead of the block's largest magnitude.

The layout is that of `reference.quantize_4bit`; nothing that reads it can tell. Where a block's values u (over
its largest magnitude) have codes c, the best scale is <u,c>/<c,c> and leaves |u|^2 - <u,c>^2/<c,c>. So each
of `_FACTORS` proposes codes, the proposal with the largest <u,c>^2/<c,c> gives the scale, and the codes
nearest under that scale are taken, if they beat the plain ones.

With double quantization offset and nested scales stay those of the plain scales. Only so is the plain choice
still among those that can be written down, and no block comes out worse; on normal weights it costs nothing.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.kernels.quantize_4bit import ops, reference

# Parts of the largest magnitude, dense where the optima of normal and of heavy-tailed weights lie.
_FACTORS = (0.70, 0.76, 0.81, 0.85, 0.89, 0.92, 0.95, 0.98, 1.02, 1.07, 1.13, 1.22, 1.33, 1.44)
_REACH = 1.5  # u over a factor stays within
_CELLS = 4096  # a unit of u, by which codes are proposed
_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 23}  # values in work at a time, some 50 bytes each
_SMALLEST_SCALE = 1e-37  # its reciprocal is finite, so blocks of zeros stay zeros
# A gain below the rounding of u and of the sums is none: parts of the error, and of the largest magnitude squared.
_LEAST_GAIN = 1e-5
_LEAST_SQUARE = 1e-10


class Levels(NamedTuple):
    """The values of a 4-bit type in ascending order, zero once."""

    values: Tensor  # (L,) fp32
    codes: Tensor  # (L,) uint8
    boundaries: Tensor  # (L - 1,) fp32, half way between
    nearest: Tensor  # fp32, the value nearest to the middle of each cell of [-_REACH, _REACH]


class _Found(NamedTuple):
    """The best that is known of each of B blocks."""

    error: Tensor  # (B,) fp32, squared, of u
    ranks: Tensor  # (B, blocksize) int32, numbers of levels
    improved: Tensor  # (B,) bool, whether it is not the plain one


@functools.cache
def levels_of(quant_type: str, device: torch.device) -> Levels:
    """Those of `nf4` or `fp4`, on `device`."""
    table = reference.CODES[quant_type]
    ascending = table.argsort(stable=True).tolist()
    minus_zero = 8 if quant_type == "fp4" else None
    codes = [code for code in ascending if code != minus_zero]
    values = table[codes]
    boundaries = (values[:-1] + values[1:]) / 2
    cells = torch.arange(-_REACH * _CELLS, _REACH * _CELLS + 1) / _CELLS
    tensors = (
        values,
        torch.tensor(codes, dtype=torch.uint8),
        boundaries,
        values[torch.bucketize(cells, boundaries)],
    )
    with torch.inference_mode(False):
        return Levels(*(tensor.to(device) for tensor in tensors))


class _Chunk(NamedTuple):
    """Some whole blocks of a weight, and where their codes and scales stand."""

    values: Tensor  # (B, blocksize) fp32, the tail filled with zeros
    packed: Tensor  # a view of their bytes in the result
    blocks: slice  # of all blocks


def _chunks(weight: Tensor, packed: Tensor, blocksize: int) -> Iterator[_Chunk]:
    flat, place = weight.reshape(-1), packed.view(-1)
    step = max(_CHUNK.get(weight.device.type, _CHUNK["cpu"]) // blocksize, 1) * blocksize
    for start in range(0, flat.numel(), step):
        values = flat[start : start + step].float()
        values = torch.nn.functional.pad(values, (0, -values.numel() % blocksize)).view(-1, blocksize)
        first = start // blocksize
        yield _Chunk(values, place[start // 2 : (start + step) // 2], slice(first, first + values.shape[0]))


def _plain_values(packed: Tensor, code: Tensor, shape: torch.Size) -> Tensor:
    """What the plain codes stand for, over the scale: (B, blocksize) fp32."""
    codes = torch.stack([packed >> 4, packed & 0xF], dim=1).view(-1)
    values = code[codes.int()]
    return torch.nn.functional.pad(values, (0, shape.numel() - values.numel())).view(shape)


def _best_scale(u: Tensor, levels: Levels) -> Tensor:
    """u (B, blocksize) in [-1, 1] -> (B,) scales near the optimum; 1 where a block is zeros."""
    best = torch.zeros(u.shape[0], device=u.device)
    scale = torch.ones_like(best)
    for factor in _FACTORS:
        cell = (u * (_CELLS / factor)).add_(_REACH * _CELLS + 0.5).int()
        c = torch.index_select(levels.nearest, 0, cell.view(-1)).view_as(u)
        match, size = (u * c).sum(dim=1), (c * c).sum(dim=1).clamp_(min=1e-30)
        fit = match / size
        gain = match * fit
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better, fit, scale)
    return scale


def _try(found: _Found, u: Tensor, scale: Tensor, levels: Levels) -> tuple[_Found, Tensor]:
    """`found` with the blocks replaced that `scale` (B,) makes better, and which ones; scales up to 0 make none."""
    ranks = torch.bucketize(u * scale.reciprocal()[:, None], levels.boundaries, out_int32=True)
    error = (levels.values[ranks] * scale[:, None]).sub_(u).square_().sum(dim=1)
    better = (scale > 0) & (error < found.error * (1 - _LEAST_GAIN) - _LEAST_SQUARE)
    best = _Found(
        torch.where(better, error, found.error),
        torch.where(better[:, None], ranks, found.ranks),
        found.improved | better,
    )
    return best, better


def _start(u: Tensor, chunk: _Chunk, plain_scale: Tensor, code: Tensor) -> _Found:
    plain = _plain_values(chunk.packed, code, u.shape)
    error = (plain * plain_scale[:, None]).sub_(u).square_().sum(dim=1)
    return _Found(error, torch.zeros_like(u, dtype=torch.int32), torch.zeros_like(error, dtype=torch.bool))


def _write(chunk: _Chunk, found: _Found, levels: Levels) -> None:
    codes = levels.codes[found.ranks]
    packed = (codes[:, 0::2] << 4) | codes[:, 1::2]
    keep = ~found.improved.repeat_interleave(packed.shape[1])[: chunk.packed.numel()]
    chunk.packed.copy_(torch.where(keep, chunk.packed, packed.view(-1)[: chunk.packed.numel()]))


def quantize_4bit(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """As `ops.quantize_4bit`, with searched scales in place of absmax; no block's squared error is larger."""
    packed, absmax = ops.quantize_4bit(weight, quant_type, blocksize)
    limit = torch.finfo(weight.dtype).max
    levels = levels_of(quant_type, weight.device)
    code = reference.on_device(f"{quant_type.upper()}_CODE", weight.device)
    for chunk in _chunks(weight, packed, blocksize):
        largest = absmax[chunk.blocks].clamp(min=_SMALLEST_SCALE)
        u = chunk.values * largest.reciprocal()[:, None]
        scale = _best_scale(u, levels)
        found = _start(u, chunk, torch.ones_like(scale), code)
        # A larger scale than the weight's largest magnitude may be beyond its dtype.
        scale = torch.where(scale * largest <= limit, scale, 0.0)
        found, better = _try(found, u, scale, levels)
        absmax[chunk.blocks] = torch.where(better, scale * largest, absmax[chunk.blocks])
        _write(chunk, found, levels)
    return packed, absmax


def quantize_4bit_double(
    weight: Tensor, quant_type: str, blocksize: int, nested_blocksize: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `ops.quantize_4bit_double`, with each block's scale the best of those that 8 bits can say."""
    packed, codes, nested_absmax, offset = ops.quantize_4bit_double(
        weight, quant_type, blocksize, nested_blocksize
    )
    levels = levels_of(quant_type, weight.device)
    code, nested_code, boundaries = (
        reference.on_device(name, weight.device)
        for name in (f"{quant_type.upper()}_CODE", "DYNAMIC_CODE", "DYNAMIC_BOUNDARIES")
    )
    limit = torch.finfo(weight.dtype).max
    spread = nested_absmax.repeat_interleave(nested_blocksize)
    for chunk in _chunks(weight, packed, blocksize):
        largest = chunk.values.abs().amax(dim=1).clamp_(min=_SMALLEST_SCALE)
        u = chunk.values * largest.reciprocal()[:, None]
        around = spread[chunk.blocks]

        def read(number: Tensor, around: Tensor = around, largest: Tensor = largest) -> Tensor:
            scale = nested_code[number] * around + offset
            return torch.where(scale <= limit, scale, 0.0) / largest

        chosen = codes[chunk.blocks].int()
        found = _start(u, chunk, read(chosen), code)
        wanted = (_best_scale(u, levels) * largest - offset) / around.clamp(min=_SMALLEST_SCALE)
        nearest = torch.bucketize(wanted, boundaries, out_int32=True)
        # The error is no parabola around its minimum, because codes change; the neighbours may be better.
        for number in (nearest, (nearest - 1).clamp_(min=0), (nearest + 1).clamp_(max=255)):
            found, better = _try(found, u, read(number), levels)
            chosen = torch.where(better, number, chosen)
        codes[chunk.blocks] = chosen.to(torch.uint8)
        _write(chunk, found, levels)
    return packed, codes, nested_absmax, offset
