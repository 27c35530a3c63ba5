"""GPTQ: chooses 4-bit codes that minimize the error of a layer's outputs, not of its weights.

For inputs x with second moment H = sum of x x^T, a weight row w that is rounded to q has the output error
(w - q) H (w - q)^T.

GPTQ rounds one column after the other. After each, it changes the columns that are not yet rounded so that
they compensate for the error (Frantar et al. 2022, arXiv:2210.17323, equations 2 and 3, with the Cholesky
factor of section 3.3):

    e = (w_j - q_j) / U_jj,    w_k -= U_jk e  for all later k,    U upper triangular, U^T U = H^-1

The absmax values are given and do not change. So the columns can be rounded in any
order; those with the largest inputs go first. The result has the same layout as plain
codes, so readers need not know how it was made.
"""

import torch
from torch import Tensor

from halfbyte.kernels.quantize_4bit.scale_search import Levels, levels_of

# Times the mean of H's diagonal, added to the diagonal: directions without inputs keep their weights.
_DAMPING = 0.02
_DAMPINGS = 5  # attempts, each with ten times the damping, until H is numerically positive definite
# Columns per batch. Within a batch they are corrected one by one; all later
# columns get the batch's errors in one product.
_COLUMNS = 64


def round_calibrated(
    weight: Tensor, moment: Tensor, scale: Tensor, quant_type: str, blocksize: int
) -> Tensor:
    """Rounds a weight (N, K) for inputs with this second moment, to packed codes uint8 (N * K / 2, 1).

    `moment` is (K, K) fp32 and symmetric; a constant factor in it has no effect. `scale` is the absmax (N * K
    / blocksize,) fp32 as dequantizing reads it (with double quantization, decoded from 8 bits). All are on
    one device. Works in fp32 and needs memory for about 3 K^2 + 3 N K more numbers.

    Raises:
        ValueError: if blocks cross row ends, or the moment is not finite or not positive definite.
    """
    outputs, width = weight.shape
    if width % blocksize:
        raise ValueError(
            f"calibrated rounding: got rows of {width} values, expected a multiple of the block size"
            f" {blocksize}"
        )
    levels = levels_of(quant_type, weight.device)
    # Round columns with large inputs first, while many columns are left to compensate.
    order = moment.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(moment[order][:, order])
    # Transposed, so that a column of the weight is contiguous. `left` is what remains to be rounded.
    left = weight.float().t()[order]  # (K, N)
    scales = scale.view(outputs, width // blocksize).t()[order // blocksize]  # (K, N)
    ranks = torch.empty_like(left, dtype=torch.int32)
    for start in range(0, width, _COLUMNS):
        here = slice(start, min(start + _COLUMNS, width))
        lost = _round_columns(left[here], scales[here], factor[here, here], levels, ranks[here])
        # Propagate the batch's errors to all later columns at once.
        left[here.stop :] -= factor[here, here.stop :].t() @ lost
    # Undo the order, then pack like `reference.quantize_4bit`.
    codes = torch.empty_like(ranks, dtype=torch.uint8)
    codes[order] = levels.codes[ranks]
    flat = codes.t().reshape(-1)
    return ((flat[0::2] << 4) | flat[1::2]).unsqueeze(1)


def output_error(difference: Tensor, moment: Tensor) -> Tensor:
    """Returns the squared output error tr(D H D^T), () fp64, of weights off by D = `difference` (N, K)."""
    difference = difference.float()
    return ((difference @ moment) * difference).sum(dtype=torch.float64)


def _round_columns(left: Tensor, scales: Tensor, factor: Tensor, levels: Levels, ranks: Tensor) -> Tensor:
    """Rounds columns `left` (C, N) into `ranks` (C, N), returns their errors e (C, N), overwrites `left`."""
    # Encoding absmax in 8 bits may give 0 or a negative value. Such a block is treated as a block of zeros.
    inverse = torch.where(scales > 0, scales.reciprocal(), 0)
    lost = torch.empty_like(left)
    for i in range(left.shape[0]):
        ranks[i] = torch.bucketize(left[i] * inverse[i], levels.boundaries, out_int32=True)
        torch.sub(left[i], levels.values[ranks[i]] * scales[i], out=lost[i])
        lost[i] /= factor[i, i]
        left[i + 1 :] -= factor[i, i + 1 :, None] * lost[i]
    return lost


def _inverse_factor(moment: Tensor) -> Tensor:
    """Returns the upper triangular U with U^T U = (H + damping)^-1. Overwrites `moment`.

    Holds at most three matrices of this size at a time, including `moment`: 2.8 GB for FLUX's widest layer.

    Raises:
        ValueError: if the moment is not finite, or not positive definite even with the largest damping.
    """
    diagonal = moment.diagonal().clone()
    size = diagonal.mean()
    if not torch.isfinite(diagonal).all() or size < 0:
        raise ValueError(
            "calibrated rounding: the inputs' second moment has NaN, infinite or negative diagonal values,"
            " expected finite values of at least 0; check the calibration inputs"
        )
    # If all inputs were zero, every column gets the same weight.
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
        "calibrated rounding: the inputs' second moment is not positive definite, even with"
        f" {_DAMPING * 10 ** (_DAMPINGS - 1):g} times the mean of its diagonal added; check the calibration"
        " inputs"
    )
