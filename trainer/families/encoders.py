"""The VAE and text encoders of a pipeline, and what they make of pictures and captions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from halfbyte.trainer.families.t5 import T5Setting, load_t5, settle, tell_stored
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.runtime.device_memory import free_unused
from halfbyte.trainer.runtime.placement import Placement

if TYPE_CHECKING:
    from halfbyte.trainer.families.family import Family


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


class PipelineEncoders(Encoders):
    """Encoders that call the stock pipeline's own `encode_prompt`, so training sees what inference will.

    Weights are read when first needed: a run whose cache is full reads none.
    """

    def __init__(
        self,
        family: "Family",
        *,
        placement: Placement,
        dtype: torch.dtype,
        memo: Path,
        t5_quant: T5Setting,
        stream_t5: bool,
    ) -> None:
        source, digests = family.source, FileDigests(memo)
        self._family = family
        self._placement = placement
        self._device = placement.device
        self._dtype = dtype
        self._t5_quant = settle(t5_quant, family.t5.path, named_by=family.t5.setting)
        tell_stored(t5_quant, family.t5.path)
        self._stream_t5 = stream_t5
        self._vae: Any = None
        self._pipeline: Any = None
        # The VAE runs in fp32: its encoder is small, and overflows to NaN in fp16 on some pictures.
        self.latent_fingerprint = source.fingerprint(["vae"], digests) + ":float32"
        settings = f"{family.max_sequence_length}:{dtype}:{self._t5_quant}"
        self.text_fingerprint = family.text_fingerprint(digests) + ":" + settings

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> LatentMoments:
        """The posterior's moments, by the stock VAE."""
        if self._vae is None:
            # On a small card there is no room for both.
            self._pipeline = None
            free_unused(self._device)
            folder = self._family.source.folder / "vae"
            vae: Any = AutoencoderKL.from_pretrained(folder, dtype=torch.float32)
            # As cuDNN wants it; else it copies what goes into a convolution and what comes out, 1 GB at 1024 px.
            layout = torch.channels_last if self._device.type == "cuda" else torch.preserve_format
            self._vae = vae.to(self._device, memory_format=layout)
        posterior = self._vae.encode(pixels.to(self._device, torch.float32)).latent_dist
        return LatentMoments(posterior.mean.cpu(), posterior.std.cpu())

    @torch.no_grad()
    def encode_texts(self, captions: Sequence[str]) -> TextEmbedding:
        """The caption as the stock pipeline embeds it, padded as the recipe says."""
        if self._pipeline is None:
            self._vae = None
            free_unused(self._device)
            t5 = load_t5(
                self._family.t5.path,
                self._t5_quant,
                dtype=self._dtype,
                device=self._placement.loads_on,
                stream=self._stream_t5,
                named_by=self._family.t5.setting,
            )
            self._pipeline = self._family.pipeline_class.from_pretrained(
                self._family.source.folder,
                transformer=None,
                vae=None,
                dtype=self._dtype,
                **{self._family.t5_component: t5},
            )
            self._placement.place(self._pipeline)
        embedding = self._family.embed(self._pipeline, list(captions), self._device)
        return TextEmbedding(
            embedding.prompt_embeds.to("cpu", torch.bfloat16),
            embedding.pooled_prompt_embeds.to("cpu", torch.bfloat16),
        )
