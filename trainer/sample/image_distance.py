"""Measures the distance of generated images from their references: RMSE of pixels and structural similarity."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from halfbyte.trainer.sample.sampler import Drawn

_WINDOW, _WINDOW_STD = 11, 1.5  # pixels
_K1, _K2 = 0.01, 0.03


@dataclass(frozen=True)
class Distance:
    """The distance between an image and its reference, or the mean over several images."""

    rmse: float  # root mean square error of colors in 0 to 1; 0 for identical images
    ssim: float  # structural similarity: 1 for identical images, near 0 for unrelated ones


@dataclass(frozen=True)
class PictureChange:
    """The mean distance from the references before and after training."""

    pictures: int  # the number of images with a reference
    base: Distance
    trained: Distance


def picture_change(drawn: Sequence[Drawn]) -> PictureChange | None:
    """Returns the mean change over the prompts with a reference; None if no prompt has one."""
    known = [(one, one.reference) for one in drawn if one.reference is not None]
    if not known:
        return None
    base = [distance(one.base, reference) for one, reference in known]
    trained = [distance(one.trained, reference) for one, reference in known]
    return PictureChange(len(known), _mean(base), _mean(trained))


def distance(picture: Image.Image, reference: Image.Image) -> Distance:
    """Measures the distance of two images of the same size."""
    assert picture.size == reference.size, f"{picture.size} against {reference.size}"
    ours, theirs = _colors(picture), _colors(reference)
    return Distance((ours - theirs).square().mean().sqrt().item(), ssim(ours, theirs))


def ssim(one: Tensor, other: Tensor) -> float:
    """Returns the structural similarity of two images (C, H, W) in [0, 1], the mean over positions and channels.

    H and W must be at least 11. From Wang et al. 2004 (IEEE Transactions on Image Processing 13, 600-612), equation 13
    with its Gaussian window.
    """
    ramp = torch.arange(_WINDOW, dtype=one.dtype) - _WINDOW // 2
    window = torch.exp(-(ramp**2) / (2 * _WINDOW_STD**2))
    window = (window / window.sum()).outer(window / window.sum())[None, None]

    def blurred(values: Tensor) -> Tensor:
        return F.conv2d(values[:, None], window)

    mean_one, mean_other = blurred(one), blurred(other)
    variance_one = blurred(one * one) - mean_one**2
    variance_other = blurred(other * other) - mean_other**2
    covariance = blurred(one * other) - mean_one * mean_other
    means = (2 * mean_one * mean_other + _K1**2) / (mean_one**2 + mean_other**2 + _K1**2)
    structure = (2 * covariance + _K2**2) / (variance_one + variance_other + _K2**2)
    return (means * structure).mean().item()


def _colors(picture: Image.Image) -> Tensor:
    """Returns the pixels as (3, H, W) float64 in [0, 1]."""
    return torch.from_numpy(numpy.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1).double() / 255


def _mean(distances: Sequence[Distance]) -> Distance:
    return Distance(
        statistics.fmean(one.rmse for one in distances), statistics.fmean(one.ssim for one in distances)
    )
