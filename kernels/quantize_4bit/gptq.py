"""4-bit codes chosen for what a layer gives, not for its weights: GPTQ's rounding, in the layout of all others.

Over inputs x with second moment H = sum of x x^T, a row of weights w rounded to q errs by (w - q) H (w - q)^T. Columns
are rounded one after the other, and what each loses is made good by the ones still to come (Frantar et al. 2022,
arXiv 2210.17323, equations 2 and 3, by the Cholesky factor of its section 3.3). The scales are given and stay as they
are: so columns can go in any order, and do, those with the largest inputs first; and nothing that reads the result can
tell it from plain codes.
"""

import torch
from torch import Tensor

from halfbyte.kernels.quantize_4bit.scale_search import Levels, levels_of

_DAMPING = 0.02  # of the mean of H's diagonal, added to it: directions without inputs keep their weights
_DAMPINGS = 5  # tries, each with ten times as much, until rounding leaves H positive
_COLUMNS = 64  # corrected one by one, before their errors reach the other columns as one product


def round_calibrated(
    weight: Tensor, moment: Tensor, scale: Tensor, quant_type: str, blocksize: int
) -> Tensor:
    """Packed codes uint8 (N * K / 2, 1) of a weight (N, K) for inputs with this second moment.

    moment: (K, K) fp32, symmetric; its own scale does not matter. scale: (N * K / blocksize,) fp32, as it is read back
    from 8 bits. All on one device. Works in fp32 and takes some 3 K^2 + 3 N K numbers besides.

    Raises ValueError where blocks go over the ends of rows, or the moment is none.
    """
    outputs, width = weight.shape
    if width % blocksize:
        raise ValueError(f"calibrated rounding: rows of {width} are no whole number of blocks of {blocksize}")
    levels = levels_of(quant_type, weight.device)
    order = moment.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(moment[order][:, order])
    # Columns of the weight as rows, so that each lies in one piece.
    left = weight.float().t()[order]  # (K, N)
    scales = scale.view(outputs, width // blocksize).t()[order // blocksize]  # (K, N)
    ranks = torch.empty_like(left, dtype=torch.int32)
    for start in range(0, width, _COLUMNS):
        here = slice(start, min(start + _COLUMNS, width))
        lost = _round_columns(left[here], scales[here], factor[here, here], levels, ranks[here])
        left[here.stop :] -= factor[here, here.stop :].t() @ lost
    codes = torch.empty_like(ranks, dtype=torch.uint8)
    codes[order] = levels.codes[ranks]
    flat = codes.t().reshape(-1)
    return ((flat[0::2] << 4) | flat[1::2]).unsqueeze(1)


def output_error(difference: Tensor, moment: Tensor) -> Tensor:
    """Sum of the squared errors that weights off by `difference` (N, K) make over inputs of this moment: () fp64."""
    difference = difference.float()
    return ((difference @ moment) * difference).sum(dtype=torch.float64)


def _round_columns(left: Tensor, scales: Tensor, factor: Tensor, levels: Levels, ranks: Tensor) -> Tensor:
    """Rounds the columns `left` (C, N), which it changes, into `ranks`; their errors over the factor, (C, N)."""
    # A scale that 8 bits made zero, or turned around, stands for a block of zeros.
    inverse = torch.where(scales > 0, scales.reciprocal(), 0)
    lost = torch.empty_like(left)
    for i in range(left.shape[0]):
        ranks[i] = torch.bucketize(left[i] * inverse[i], levels.boundaries, out_int32=True)
        torch.sub(left[i], levels.values[ranks[i]] * scales[i], out=lost[i])
        lost[i] /= factor[i, i]
        left[i + 1 :] -= factor[i, i + 1 :, None] * lost[i]
    return lost


def _inverse_factor(moment: Tensor) -> Tensor:
    """The upper triangle U with U^T U = (H + damping)^-1; writes over `moment`. Raises ValueError.

    Three matrices of its size are held at most, `moment` among them: 2.8 GB for the widest of FLUX's layers.
    """
    diagonal = moment.diagonal().clone()
    size = diagonal.mean()
    if not torch.isfinite(diagonal).all() or size < 0:
        raise ValueError(
            "calibrated rounding: the inputs' second moment holds NaN, infinite or negative values"
        )
    # Inputs that were all zeros tell nothing: every column counts the same then.
    size = torch.where(size > 0, size, torch.ones_like(size))
    damping = _DAMPING
    for _ in range(_DAMPINGS):
        moment.diagonal().copy_(diagonal + damping * size)
        lower, failed = torch.linalg.cholesky_ex(moment)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        damping *= 10
    raise ValueError(
        "calibrated rounding: the inputs' second moment is not positive, whatever is added to it"
    )
