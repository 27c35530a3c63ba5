"""Outputs of the VAE and the text encoders, and the interface of what computes them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentMoments:
    """The VAE's posterior before shift and scale. Stored as moments, so that each use draws a new sample."""

    mean: Tensor  # (B, C, H/8, W/8) fp32
    std: Tensor  # (B, C, H/8, W/8) fp32


@dataclass(frozen=True)
class TextEmbedding:
    """A batch of captions as the denoiser sees them."""

    prompt_embeds: Tensor  # (B, T, joint_attention_dim) bf16
    pooled_prompt_embeds: Tensor  # (B, pooled_projection_dim) bf16


class Encoders(ABC):
    """The frozen VAE and text encoders of one pipeline. They are in memory only while the cache is filled."""

    # Identify the weights and every setting that changes the output (dtype, token length). A cache key
    # consists of one of these and a digest of the image or the caption.
    latent_fingerprint: str
    text_fingerprint: str
    device: torch.device = torch.device("cpu")
    """Where the encoders compute. Pixels are already there."""

    @property
    def text_batch(self) -> int:
        """The number of captions that are encoded at once."""
        return 1

    def image_batch(self, width: int, height: int) -> int:
        """Returns the number of images of a size, in pixels, that are encoded at once."""
        return 1

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> LatentMoments:
        """Returns the images' posterior moments, on `device`.

        pixels: (B, 3, H, W) fp32 in [-1, 1], H and W multiples of the family's `size_multiple`.
        """

    @abstractmethod
    def encode_texts(self, captions: Sequence[str]) -> TextEmbedding:
        """Returns one row per caption, on `device`. Caption dropout trains on the row of the empty caption."""
