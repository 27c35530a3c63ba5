"""Differential output preservation: the adapted model learns to predict for a class caption what the base predicts.

Each training sample is also shown, at the same noise, with the class caption. With v the adapted model's velocity, v0
that of the base and c the class caption, the loss of a sample becomes

    distance(v(x, its caption), noise - x0) + weight * distance(v(x, c), v0(x, c))

The base is the same model with the adapters switched off, so there is no second one in memory. The adapted predictions
for both captions are one forward pass of twice the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.trainer.adapters.lora import without_adapters
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family


@dataclass(frozen=True)
class Preservation:
    """The class caption's embedding, (1, T, D) and (1, P), and the factor of its part of the loss."""

    embedding: TextEmbedding
    weight: float

    def predict(
        self,
        family: Family,
        denoiser: nn.Module,
        forward_fn: Callable[..., Any],
        noisy: Tensor,
        sigma: Tensor,
        text: TextEmbedding,
        guidance_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns velocities (B, C, h, w): adapted for the samples' captions, adapted and base for the class caption.

        Args:
            forward_fn: called in place of the denoiser for the adapted predictions.
            noisy: (B, C, h, w).
            sigma: (B,) fp32.
            text: the embeddings of the samples' captions, (B, T, D) and (B, P).
        """
        embeds, pooled = (
            own.to(like.device, like.dtype).expand_as(like)
            for own, like in (
                (self.embedding.prompt_embeds, text.prompt_embeds),
                (self.embedding.pooled_prompt_embeds, text.pooled_prompt_embeds),
            )
        )
        with torch.no_grad(), without_adapters(denoiser):
            kept = family.predict(denoiser, noisy, sigma, TextEmbedding(embeds, pooled), guidance_scale)
        both = TextEmbedding(
            torch.cat([text.prompt_embeds, embeds]), torch.cat([text.pooled_prompt_embeds, pooled])
        )
        twice = family.predict(
            forward_fn, torch.cat([noisy, noisy]), torch.cat([sigma, sigma]), both, guidance_scale
        )
        velocity, drifted = twice.chunk(2)
        return velocity, drifted, kept
