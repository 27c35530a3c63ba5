"""Loads a family's VAE and text encoders, which encode images and captions for the cache."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from halfbyte.quant.load.transformer import stored_quantization
from halfbyte.trainer.families.embedding import Encoders, LatentMoments, TextEmbedding
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.stock_parts import load_clips, load_tokenizers, load_vae, stock_pipeline
from halfbyte.trainer.families.t5 import (
    T5Quant,
    T5Setting,
    load_t5,
    resolve_quant,
    warn_if_stored_differently,
)
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.runtime.device_memory import free_bytes, free_unused, total_bytes
from halfbyte.trainer.runtime.placement import Placement

_TEXT_TOKENS = 4096  # in a batch of captions; more are no faster
_BATCH_PIXELS = 4 * 2**20  # in a batch of images; an H200 takes 49 ms an image in four, 67 alone
_BATCHED_FROM = 23 * 2**30
"""Device memory from which batches are encoded; with less, one image or caption at a time, as plans assume."""


def text_fingerprint(family: Family, digests: FileDigests, dtype: torch.dtype, quant: T5Quant) -> str:
    """Returns a string that identifies the text encoders and every setting that changes their output."""
    return f"{family.text_fingerprint(digests)}:{family.max_sequence_length}:{dtype}:{quant}"


class PipelineEncoders(Encoders):
    """Encoders that call the stock pipeline's `encode_prompt`, so training sees the embeddings of inference.

    Weights are read when they are first needed: a run with a complete cache reads none.
    """

    def __init__(
        self,
        family: Family,
        *,
        placement: Placement,
        dtype: torch.dtype,
        memo: Path,
        t5_quant: T5Setting,
        stream_t5: bool,
        vae_dtype: torch.dtype,
    ) -> None:
        source, digests = family.source, FileDigests(memo)
        self._family = family
        self._placement = placement
        self.device = placement.device
        self._dtype = dtype
        free = free_bytes(placement.device) if placement.stays and not stream_t5 else None
        self._t5_quant = resolve_quant(t5_quant, family.t5.path, free=free, named_by=family.t5.setting)
        warn_if_stored_differently(t5_quant, family.t5.path)
        self._stream_t5 = stream_t5
        self._vae: Any = None
        self._pipeline: Any = None
        # Not in fp16, in which the VAE overflows to NaN on some images.
        self._vae_dtype = vae_dtype
        self.latent_fingerprint = (
            f"{source.fingerprint(['vae'], digests)}:{str(vae_dtype).removeprefix('torch.')}"
        )
        self.text_fingerprint = text_fingerprint(family, digests, dtype, self._t5_quant)

    @property
    def text_batch(self) -> int:
        """Captions of 4096 tokens together on a CUDA device with room for them, else one.

        LLM.int8() takes the outlier columns of a whole batch, so the captions would change each other's embeddings.
        """
        stored = stored_quantization(self._family.t5.path)
        is_int8 = (self._t5_quant if stored is None else stored.quant_type) == "int8"
        if is_int8 or not self._takes_batches:
            return 1
        return max(1, _TEXT_TOKENS // self._family.max_sequence_length)

    def image_batch(self, width: int, height: int) -> int:
        """Returns the number of images of 4 megapixels together on a CUDA device with room for them, else one."""
        return max(1, _BATCH_PIXELS // (width * height)) if self._takes_batches else 1

    @cached_property
    def _takes_batches(self) -> bool:
        """True where batches are faster. By the whole memory, so that a card gives the same entries at any time."""
        on_cuda = self.device.type == "cuda" and self._placement.stays and not self._stream_t5
        return on_cuda and total_bytes(self.device) >= _BATCHED_FROM

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> LatentMoments:
        """Returns the posterior's mean and std, computed by the stock VAE."""
        if self._vae is None:
            # A small card has no room for the VAE and the text encoders at once.
            self._pipeline = None
            free_unused(self.device)
            # Not in channels_last: torch's group norm copies its input and output in that layout. An H200 takes 49 ms
            # for an image of 1024 px as it is, and 74 ms in channels_last (batches of four, float32).
            self._vae = load_vae(self._family, self._vae_dtype, self.device)
        encoded = self._vae.encode(pixels.to(self.device, self._vae_dtype)).latent_dist
        # In fp32 from here: the deviation is the exponential of the VAE's output.
        posterior = DiagonalGaussianDistribution(encoded.parameters.float())
        return LatentMoments(posterior.mean, posterior.std)

    @torch.no_grad()
    def encode_texts(self, captions: Sequence[str]) -> TextEmbedding:
        """Returns the captions' embeddings from the stock pipeline, padded to the recipe's length."""
        if self._pipeline is None:
            self._vae = None
            free_unused(self.device)
            # First, as it is fast and its files are damaged as often.
            tokenizers = load_tokenizers(self._family)
            loads_on = self._placement.loads_on
            t5 = load_t5(
                self._family.t5.path,
                self._t5_quant,
                dtype=self._dtype,
                device=loads_on,
                stream=self._stream_t5,
                named_by=self._family.t5.setting,
            )
            clips = load_clips(self._family, self._dtype, loads_on)
            self._pipeline = stock_pipeline(
                self._family, **tokenizers, **clips, **{self._family.t5_component: t5}
            )
            self._placement.place(self._pipeline)
        embedding = self._family.embed(self._pipeline, list(captions), self.device)
        return TextEmbedding(
            embedding.prompt_embeds.to(torch.bfloat16), embedding.pooled_prompt_embeds.to(torch.bfloat16)
        )


def load_encoders(
    family: Family,
    *,
    device: torch.device,
    dtype: torch.dtype,
    memo: Path,
    t5_quant: T5Setting = "auto",
    placement: Placement | None = None,
    stream_t5: bool = False,
    vae_dtype: torch.dtype = torch.float32,
) -> Encoders:
    """Returns the VAE and text encoders of the stock pipeline; T5 is quantized as `t5_quant` says.

    memo: a folder that caches digests of the encoders' files. placement: where the text encoders are kept;
    None: on the device. stream_t5: keeps T5's blocks in host memory and streams them to the device, see
    `BlockStream`. vae_dtype: float32 or bfloat16.
    """
    where = placement or Placement(device)
    return PipelineEncoders(
        family,
        placement=where,
        dtype=dtype,
        memo=memo,
        t5_quant=t5_quant,
        stream_t5=stream_t5,
        vae_dtype=vae_dtype,
    )
