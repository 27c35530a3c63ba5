"""AdamW with 8-bit moments on CUDA: one launch updates all parameters.

An adapter has hundreds of small parameters, each in its own memory. One launch per parameter would take
longer than the updates themselves. Instead a table of addresses goes to the device, and each program looks up
which chunk of which parameter is its own. The moments of all parameters lie in one row; each parameter starts
at a block boundary. Results equal the reference's up to rounding.
"""

# mypy: disable-error-code="assignment"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.adamw_8bit.reference import BLOCK, AdamStep, Moments, codes

_BLOCKS = 8  # per program; these 8 * 256 values are one chunk
_NUM_WARPS = 8


class ParameterTable:
    """Maps chunks to parameters; built once for a list of parameters with fixed sizes."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        device = parameters[0].device
        owners: list[int] = []
        starts: list[int] = []
        blocks: list[int] = []
        first = 0
        for number, parameter in enumerate(parameters):
            of_parameter = triton.cdiv(parameter.numel(), BLOCK)
            chunks = range(0, of_parameter, _BLOCKS)
            owners += [number] * len(chunks)
            starts += chunks
            blocks += [first + chunk for chunk in chunks]
            first += of_parameter
        self.blocks = first  # of all parameters
        self.chunks = len(owners)
        # For each chunk: its parameter, its first block within that parameter, and
        # its first block in the row of all.
        self.places = torch.tensor([owners, starts, blocks], dtype=torch.int32).to(device)

    def addresses(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
        """Returns (3, parameters) int64 on the device: parameter address, gradient address, number of values.

        The number is 0 for a parameter without a gradient, so that its programs update nothing. Built for
        every step, because gradients are allocated again.
        """
        rows = [
            [parameter.data_ptr() for parameter in parameters],
            [0 if gradient is None else gradient.data_ptr() for gradient in gradients],
            [
                0 if gradient is None else parameter.numel()
                for parameter, gradient in zip(parameters, gradients, strict=True)
            ],
        ]
        table = torch.tensor(rows, dtype=torch.int64)
        device = self.places.device
        return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@triton.jit
def _nearest(scaled, table):
    """Returns the index of the code nearest to each value, the lower one if halfway.

    Binary search, one bit of the 8-bit index at a time, over the midpoints between neighboring codes.
    """
    index = tl.zeros(scaled.shape, tl.int32)
    for bit in tl.static_range(7, -1, -1):
        probe = index + (1 << bit)
        boundary = (tl.load(table + probe - 1) + tl.load(table + probe)) / 2
        index = tl.where(scaled > boundary, probe, index)
    return index


@triton.jit
def _requantize(values, table, quantized, scale, offset, block, mask, block_mask, LEAST: tl.constexpr):
    """Encodes moments (BLOCKS, BLOCK) fp32: stores absmax of each block, and codes not below LEAST."""
    largest = tl.max(tl.abs(values), axis=1)
    # The smallest normal fp32 keeps blocks of zeros finite.
    scaled = values / tl.maximum(largest, 1.1754943508222875e-38)[:, None]
    index = tl.maximum(_nearest(scaled, table), LEAST)
    tl.store(quantized + offset, index.to(tl.uint8), mask=mask)
    tl.store(scale + block, largest, mask=block_mask)


@triton.jit
def _step_kernel(
    addresses,
    places,
    mean,
    mean_scale,
    square,
    square_scale,
    mean_codes,
    square_codes,
    parameters,
    chunks,
    beta1,
    one_less_beta1,
    beta2,
    one_less_beta2,
    kept,
    rate,
    root_correction,
    eps,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Updates one chunk of one parameter: BLOCKS blocks of BLOCK values. Grid: (chunks,).

        m = beta1 m + (1 - beta1) g      v = beta2 v + (1 - beta2) g^2
        w = w * kept - rate * m / (sqrt(v) / root_correction + eps)

    kept = 1 - lr * decay, rate = lr / c1, root_correction = sqrt(c2). All arithmetic is fp32. The weight uses
    m and v before they are rounded to 8 bits.
    """
    chunk = tl.program_id(0)
    # The chunk's entry in `places`, then its parameter's entry in `addresses`:
    # both are flat (3, columns) tables.
    owner = tl.load(places + chunk)
    start = tl.load(places + chunks + chunk)
    first = tl.load(places + 2 * chunks + chunk).to(tl.int64)
    parameter = tl.load(addresses + owner).to(tl.pointer_type(tl.float32))
    gradient = tl.load(addresses + parameters + owner).to(tl.pointer_type(tl.float32))
    count = tl.load(addresses + 2 * parameters + owner)

    # place: index within the parameter. offset, block: index of the moments and
    # of their scales in the row of all.
    row = tl.arange(0, BLOCKS)
    lane = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    place = start.to(tl.int64) * BLOCK + lane
    mask = place < count
    block_mask = (start + row) * BLOCK < count
    offset = first * BLOCK + lane
    block = first + row

    # Decode both moments: table value times the block's absmax.
    g = tl.load(gradient + place, mask=mask, other=0.0)
    m_scale = tl.load(mean_scale + block, mask=block_mask, other=0.0)
    v_scale = tl.load(square_scale + block, mask=block_mask, other=0.0)
    m_codes = tl.load(mean + offset, mask=mask, other=0).to(tl.int32)
    v_codes = tl.load(square + offset, mask=mask, other=0).to(tl.int32)
    m = tl.load(mean_codes + m_codes) * m_scale[:, None] * beta1 + one_less_beta1 * g
    v = tl.load(square_codes + v_codes) * v_scale[:, None] * beta2 + one_less_beta2 * g * g
    # Positions past the end of the parameter must not count for a block's absmax.
    m = tl.where(mask, m, 0.0)
    v = tl.where(mask, v, 0.0)
    weight = tl.load(parameter + place, mask=mask, other=0.0)
    weight = weight * kept - rate * m / (tl.sqrt(v) / root_correction + eps)
    tl.store(parameter + place, weight, mask=mask)
    # LEAST = 1: a stored v is never 0, see the reference.
    _requantize(m, mean_codes, mean, mean_scale, offset, block, mask, block_mask, 0)
    _requantize(v, square_codes, square, square_scale, offset, block, mask, block_mask, 1)


def update(
    table: ParameterTable,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    moments: Moments,
    step: AdamStep,
) -> None:
    """Updates in place the parameters (fp32, contiguous) that have a gradient, and their moments.

    `moments` holds all parameters in a row, each padded to whole blocks, in the order of `table`.
    """
    correction1, correction2 = step.corrections
    mean_codes, square_codes = codes(parameters[0].device)
    _step_kernel[(table.chunks,)](
        table.addresses(parameters, gradients),
        table.places,
        moments.mean,
        moments.mean_scale,
        moments.square,
        moments.square_scale,
        mean_codes,
        square_codes,
        len(parameters),
        table.chunks,
        step.betas[0],
        1 - step.betas[0],
        step.betas[1],
        1 - step.betas[1],
        1 - step.lr * step.weight_decay,
        step.lr / correction1,
        correction2**0.5,
        step.eps,
        BLOCK=BLOCK,
        BLOCKS=_BLOCKS,
        num_warps=_NUM_WARPS,
    )
