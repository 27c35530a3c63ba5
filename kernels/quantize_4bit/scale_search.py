"""4-bit quantization that searches each block's scale for the least squared error, instead of using absmax.

The layout is that of `reference.quantize_4bit`, so readers need not know. Let u be a block's values divided
by its absmax, and c the table values that the codes stand for. The best scale for given codes is <u,c>/<c,c>,
with the error |u|^2 - <u,c>^2/<c,c>. The search:

1. Each of `_FACTORS` is tried as a scale and proposes codes.
2. The proposal with the largest <u,c>^2/<c,c> gives the scale <u,c>/<c,c>.
3. The nearest codes under that scale are taken if their error is smaller than that of the plain codes.

With double quantization, offset and nested scales stay those of the plain absmax. Only then can the plain
scale still be represented, which guarantees that no block gets worse. On normal weights this costs nothing.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.kernels.quantize_4bit import ops, reference

# Candidate scales, as factors of absmax; dense where the optima of normal and heavy-tailed weights lie.
_FACTORS = (0.70, 0.76, 0.81, 0.85, 0.89, 0.92, 0.95, 0.98, 1.02, 1.07, 1.13, 1.22, 1.33, 1.44)
_REACH = 1.5  # |u| / factor is at most this
_CELLS = 4096  # cells per unit of u, by which codes are proposed
_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 23}  # values processed at a time, about 50 bytes each
_SMALLEST_SCALE = 1e-37  # its reciprocal is finite, so blocks of zeros stay zeros
# Smaller gains are within the rounding of u and of the sums and do not count. Relative to the error, and
# absolute in units of absmax squared.
_LEAST_GAIN = 1e-5
_LEAST_SQUARE = 1e-10


class Levels(NamedTuple):
    """The values of a 4-bit type in ascending order, zero once."""

    values: Tensor  # (L,) fp32
    codes: Tensor  # (L,) uint8
    boundaries: Tensor  # (L - 1,) fp32, midpoints
    nearest: Tensor  # fp32, for each cell of [-_REACH, _REACH] the value nearest to its center


class _Found(NamedTuple):
    """The best codes found so far for each of B blocks."""

    error: Tensor  # (B,) fp32, squared error of u
    ranks: Tensor  # (B, blocksize) int32, indices into the levels; valid only where improved
    improved: Tensor  # (B,) bool, True if better than the plain codes


@functools.cache
def levels_of(quant_type: str, device: torch.device) -> Levels:
    """Returns the levels of `nf4` or `fp4` on `device`."""
    table = reference.CODES[quant_type]
    ascending = table.argsort(stable=True).tolist()
    # FP4 has +0 and -0; only +0 is used.
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
    """B consecutive whole blocks of a weight, and the place of their codes and scales in the result."""

    values: Tensor  # (B, blocksize) fp32, the last block padded with zeros
    packed: Tensor  # a view of their bytes in the result
    blocks: slice  # their range among all blocks


def _chunks(weight: Tensor, packed: Tensor, blocksize: int) -> Iterator[_Chunk]:
    flat, place = weight.reshape(-1), packed.view(-1)
    step = max(_CHUNK.get(weight.device.type, _CHUNK["cpu"]) // blocksize, 1) * blocksize
    for start in range(0, flat.numel(), step):
        values = flat[start : start + step].float()
        values = torch.nn.functional.pad(values, (0, -values.numel() % blocksize)).view(-1, blocksize)
        first = start // blocksize
        yield _Chunk(values, place[start // 2 : (start + step) // 2], slice(first, first + values.shape[0]))


def _plain_values(packed: Tensor, code: Tensor, shape: torch.Size) -> Tensor:
    """Returns the table values of the plain codes, (B, blocksize) fp32, without the scale."""
    codes = torch.stack([packed >> 4, packed & 0xF], dim=1).view(-1)
    values = code[codes.int()]
    return torch.nn.functional.pad(values, (0, shape.numel() - values.numel())).view(shape)


def _best_scale(u: Tensor, levels: Levels) -> Tensor:
    """Returns scales (B,) near the optimum for u (B, blocksize) in [-1, 1]; 1 for a block of zeros."""
    best = torch.zeros(u.shape[0], device=u.device)
    scale = torch.ones_like(best)
    for factor in _FACTORS:
        # Codes c under this factor, by a table of cells instead of a search. A code in a cell with a boundary
        # may be the second nearest, which is close enough for a proposal.
        cell = (u * (_CELLS / factor)).add_(_REACH * _CELLS + 0.5).int()
        c = torch.index_select(levels.nearest, 0, cell.view(-1)).view_as(u)
        match, size = (u * c).sum(dim=1), (c * c).sum(dim=1).clamp_(min=1e-30)
        fit = match / size  # <u,c>/<c,c>, the best scale for these codes
        gain = match * fit  # <u,c>^2/<c,c>, by which it reduces |u|^2
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better, fit, scale)
    return scale


def _try(found: _Found, u: Tensor, scale: Tensor, levels: Levels) -> tuple[_Found, Tensor]:
    """Tries `scale` (B,) and returns (`found` with the improved blocks replaced, mask of those blocks (B,)).

    Scales of 0 or less never improve a block.
    """
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
    """Returns the plain codes' errors as a start; `plain_scale` (B,) is relative to absmax, like u."""
    plain = _plain_values(chunk.packed, code, u.shape)
    error = (plain * plain_scale[:, None]).sub_(u).square_().sum(dim=1)
    return _Found(error, torch.zeros_like(u, dtype=torch.int32), torch.zeros_like(error, dtype=torch.bool))


def _write(chunk: _Chunk, found: _Found, levels: Levels) -> None:
    """Packs the codes of the improved blocks into the result and leaves the other blocks unchanged."""
    codes = levels.codes[found.ranks]
    packed = (codes[:, 0::2] << 4) | codes[:, 1::2]
    keep = ~found.improved.repeat_interleave(packed.shape[1])[: chunk.packed.numel()]
    chunk.packed.copy_(torch.where(keep, chunk.packed, packed.view(-1)[: chunk.packed.numel()]))


def quantize_4bit(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantizes like `ops.quantize_4bit`, with searched scales in place of absmax.

    No block has a larger squared error than with absmax.
    """
    packed, absmax = ops.quantize_4bit(weight, quant_type, blocksize)
    limit = torch.finfo(weight.dtype).max
    levels = levels_of(quant_type, weight.device)
    code = reference.on_device(f"{quant_type.upper()}_CODE", weight.device)
    for chunk in _chunks(weight, packed, blocksize):
        largest = absmax[chunk.blocks].clamp(min=_SMALLEST_SCALE)
        u = chunk.values * largest.reciprocal()[:, None]
        scale = _best_scale(u, levels)
        found = _start(u, chunk, torch.ones_like(scale), code)
        # A scale above absmax may exceed the range of the weight's dtype. 0 makes `_try` reject it.
        scale = torch.where(scale * largest <= limit, scale, 0.0)
        found, better = _try(found, u, scale, levels)
        absmax[chunk.blocks] = torch.where(better, scale * largest, absmax[chunk.blocks])
        _write(chunk, found, levels)
    return packed, absmax


def quantize_4bit_double(
    weight: Tensor, quant_type: str, blocksize: int, nested_blocksize: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantizes like `ops.quantize_4bit_double`, with the best of the scales that 8 bits can represent.

    No block has a larger squared error than with `ops.quantize_4bit_double`.
    """
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
            """Decodes 8-bit scales, relative to absmax; 0 if they exceed the range of the weight's dtype."""
            scale = nested_code[number] * around + offset
            return torch.where(scale <= limit, scale, 0.0) / largest

        chosen = codes[chunk.blocks].int()
        found = _start(u, chunk, read(chosen), code)
        wanted = (_best_scale(u, levels) * largest - offset) / around.clamp(min=_SMALLEST_SCALE)
        nearest = torch.bucketize(wanted, boundaries, out_int32=True)
        # Changing codes make the error no parabola of the scale, so also try the
        # neighbors of the nearest 8-bit scale.
        for number in (nearest, (nearest - 1).clamp_(min=0), (nearest + 1).clamp_(max=255)):
            found, better = _try(found, u, read(number), levels)
            chosen = torch.where(better, number, chosen)
        codes[chunk.blocks] = chosen.to(torch.uint8)
        _write(chunk, found, levels)
    return packed, codes, nested_absmax, offset
