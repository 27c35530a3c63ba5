"""Outputs of the VAE and the text encoders."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class LatentMoments:
    """The VAE's posterior, before its shift and scale: kept as moments so that each use samples anew."""

    mean: Tensor  # (B, C, H/8, W/8) fp32
    std: Tensor  # (B, C, H/8, W/8) fp32


@dataclass(frozen=True)
class TextEmbedding:
    """What the denoiser sees of a caption."""

    prompt_embeds: Tensor  # (B, T, joint_attention_dim) bf16
    pooled_prompt_embeds: Tensor  # (B, pooled_projection_dim) bf16


class Encoders(ABC):
    """The frozen VAE and text encoders of one pipeline, alive only while the cache is filled."""

    # Hex digests over the weights' revision and every setting that changes the output (dtype, token length):
    # the part of a cache key that the picture or the caption itself does not give.
    latent_fingerprint: str
    text_fingerprint: str

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> LatentMoments:
        """pixels: (B, 3, H, W) fp32 in [-1, 1], H and W multiples of the family's `size_multiple`."""

    @abstractmethod
    def encode_texts(self, captions: Sequence[str]) -> TextEmbedding:
        """One row a caption; the empty caption is what caption dropout trains on."""
