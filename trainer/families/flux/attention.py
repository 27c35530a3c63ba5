"""FLUX's attention processor for blocks that run layer by layer.

Queries, keys and values of a stream share their input. `lora_linears` computes their adapters' x A^T in one
product. Without adapters the outputs are bitwise identical to diffusers' own. Autograd computes the backward;
blocks that run as one function use `blocks.attention` instead.
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
    """Computes queries, keys and values of a stream in one pass over its tokens."""

    def __init__(self, backend: str | None = None) -> None:
        """Stores the backend, one of `halfbyte.kernels.attention.ops`.

        None leaves the choice to diffusers, except in training on a GPU: torch might then take cuDNN, whose
        backward is wrong for some gradient layouts (see `trainable_backend`).
        """
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
        """Attends over the image's tokens (B, S, D), in dual blocks together with the text's (B, T, D).

        Returns tensors of the same shapes: the image's, in dual blocks a pair (image, text).
        """
        module: Any = attn
        image = lora_linears(hidden_states, (module.to_q, module.to_k, module.to_v))
        if encoder_hidden_states is None:
            return self.attend(attn, image, None, attention_mask, image_rotary_emb)
        layers = (module.add_q_proj, module.add_k_proj, module.add_v_proj)
        text = lora_linears(encoder_hidden_states, layers)
        mixed = self.attend(attn, image, text, attention_mask, image_rotary_emb)
        # Split all tokens into the two streams again: text first, then image.
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
        """Returns attention's output for all tokens, text first: (B, T + S, heads * head_dim)."""
        module: Any = attn
        # (B, S, heads, head_dim); RMSNorm acts on each head.
        query, key, value = (part.unflatten(-1, (-1, module.head_dim)) for part in image)
        query, key = module.norm_q(query), module.norm_k(key)
        # Text and image are normalized with their own weights, then joined along the sequence.
        if text is not None:
            text_query, text_key, text_value = (part.unflatten(-1, (-1, module.head_dim)) for part in text)
            query = torch.cat((module.norm_added_q(text_query), query), dim=1)
            key = torch.cat((module.norm_added_k(text_key), key), dim=1)
            value = torch.cat((text_value, value), dim=1)
        # Rope depends on the position in the joint sequence; values are not rotated.
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
