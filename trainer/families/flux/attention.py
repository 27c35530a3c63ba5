"""FLUX's attention with the adapters of layers that share an input in one product.

Without adapters the outputs are diffusers' own to the bit.
"""

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn

from halfbyte.kernels.attention.ops import attention, trainable_backend
from halfbyte.quant.lora.layers import lora_linears
from halfbyte.trainer.families.blocks.attention import Rotary

Projected = tuple[Tensor, ...]  # queries, keys, values: three of (B, S, heads * head_dim)


class FluxSharedInputAttention(transformer_flux.FluxAttnProcessor):
    """Queries, keys and values of a stream from one pass over its tokens."""

    def __init__(self, backend: str | None = None) -> None:
        """`backend`: one of `halfbyte.kernels.attention.ops`; None leaves the choice to diffusers, save where that
        would train with cuDNN."""
        super().__init__()
        self.backend = backend

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, S, dim), with the text's (B, T, dim) in the dual blocks: what goes in comes out."""
        module: Any = attn
        image = lora_linears(hidden_states, (module.to_q, module.to_k, module.to_v))
        if encoder_hidden_states is None:
            return self.attend(attn, image, None, attention_mask, image_rotary_emb)
        layers = (module.add_q_proj, module.add_k_proj, module.add_v_proj)
        text = lora_linears(encoder_hidden_states, layers)
        mixed = self.attend(attn, image, text, attention_mask, image_rotary_emb)
        texts = encoder_hidden_states.shape[1]
        projected, dropout = module.to_out
        image_mixed = dropout(projected(mixed[:, texts:].contiguous()))
        return image_mixed, module.to_add_out(mixed[:, :texts].contiguous())

    def attend(
        self,
        attn: nn.Module,
        image: Projected,
        text: Projected | None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """The attention of all tokens, text first: (B, T + S, heads * head_dim)."""
        module: Any = attn
        query, key, value = (part.unflatten(-1, (-1, module.head_dim)) for part in image)
        query, key = module.norm_q(query), module.norm_k(key)
        if text is not None:
            text_query, text_key, text_value = (part.unflatten(-1, (-1, module.head_dim)) for part in text)
            query = torch.cat((module.norm_added_q(text_query), query), dim=1)
            key = torch.cat((module.norm_added_k(text_key), key), dim=1)
            value = torch.cat((text_value, value), dim=1)
        if rotary is not None:
            query, key = (apply_rotary_emb(part, rotary, sequence_dim=1) for part in (query, key))
        backend = self.backend
        if backend is None and self._attention_backend is None:
            backend = trainable_backend(query)
        if mask is None and backend is not None:
            return attention(query, key, value, backend)[0].flatten(2, 3)
        mixed = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return mixed.flatten(2, 3).to(query.dtype)
