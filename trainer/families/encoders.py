"""Loads a family's VAE and text encoders, which encode images and captions for the cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.trainer.families.embedding import Encoders, LatentMoments, TextEmbedding
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.stock_parts import load_clips, load_tokenizers, load_vae, stock_pipeline
from halfbyte.trainer.families.t5 import T5Setting, load_t5, resolve_quant, warn_if_stored_differently
from halfbyte.trainer.pretrained.file_digests import FileDigests
from halfbyte.trainer.runtime.device_memory import free_unused
from halfbyte.trainer.runtime.placement import Placement


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
    ) -> None:
        source, digests = family.source, FileDigests(memo)
        self._family = family
        self._placement = placement
        self._device = placement.device
        self._dtype = dtype
        self._t5_quant = resolve_quant(t5_quant, family.t5.path, named_by=family.t5.setting)
        warn_if_stored_differently(t5_quant, family.t5.path)
        self._stream_t5 = stream_t5
        self._vae: Any = None
        self._pipeline: Any = None
        # The VAE runs in fp32: its encoder is small, and in fp16 it overflows to NaN on some images.
        self.latent_fingerprint = source.fingerprint(["vae"], digests) + ":float32"
        settings = f"{family.max_sequence_length}:{dtype}:{self._t5_quant}"
        self.text_fingerprint = family.text_fingerprint(digests) + ":" + settings

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> LatentMoments:
        """Returns the posterior's mean and std, computed by the stock VAE."""
        if self._vae is None:
            # A small card has no room for the VAE and the text encoders at once.
            self._pipeline = None
            free_unused(self._device)
            vae: Any = load_vae(self._family, torch.float32, self._device)
            # cuDNN's layout. With another one it copies each convolution's input and output, 1 GB at 1024 px.
            layout = torch.channels_last if self._device.type == "cuda" else torch.preserve_format
            self._vae = vae.to(memory_format=layout)
        posterior = self._vae.encode(pixels.to(self._device, torch.float32)).latent_dist
        return LatentMoments(posterior.mean.cpu(), posterior.std.cpu())

    @torch.no_grad()
    def encode_texts(self, captions: Sequence[str]) -> TextEmbedding:
        """Returns the captions' embeddings from the stock pipeline, padded to the recipe's length."""
        if self._pipeline is None:
            self._vae = None
            free_unused(self._device)
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
        embedding = self._family.embed(self._pipeline, list(captions), self._device)
        return TextEmbedding(
            embedding.prompt_embeds.to("cpu", torch.bfloat16),
            embedding.pooled_prompt_embeds.to("cpu", torch.bfloat16),
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
) -> Encoders:
    """Returns the VAE and text encoders of the stock pipeline; T5 is quantized as `t5_quant` says.

    memo: a folder that caches digests of the encoders' files. placement: where the text encoders are kept;
    None: on the device. stream_t5: keeps T5's blocks in host memory and streams them to the device, see
    `BlockStream`.
    """
    where = placement or Placement(device)
    return PipelineEncoders(
        family, placement=where, dtype=dtype, memo=memo, t5_quant=t5_quant, stream_t5=stream_t5
    )
