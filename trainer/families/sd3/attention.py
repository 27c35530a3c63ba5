"""SD3's joint attention with the adapters of layers that share an input in one product.

Without adapters the outputs are diffusers' own to the bit.
"""

from typing import Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn

from halfbyte.kernels.attention.ops import attention, trainable_backend
from halfbyte.quant.lora.layers import lora_linears


class SD3SharedInputAttention(JointAttnProcessor2_0):
    """Queries, keys and values of a stream from one pass over its tokens."""

    def __init__(self, backend: str | None = None) -> None:
        """`backend`: one of `halfbyte.kernels.attention.ops`'s; None leaves the choice to torch, save where that would
        train with cuDNN."""
        super().__init__()
        self.backend = backend

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, S, dim), with the text's (B, T, dim) in joint attention: what goes in comes out."""
        module: Any = attn
        query, key, value = self._heads(
            module,
            lora_linears(hidden_states, (module.to_q, module.to_k, module.to_v)),
            module.norm_q,
            module.norm_k,
        )
        if encoder_hidden_states is not None:
            layers = (module.add_q_proj, module.add_k_proj, module.add_v_proj)
            text = self._heads(
                module,
                lora_linears(encoder_hidden_states, layers),
                module.norm_added_q,
                module.norm_added_k,
            )
            query, key, value = (
                torch.cat(pair, dim=2) for pair in zip((query, key, value), text, strict=True)
            )
        backend = self.backend or trainable_backend(query)
        if backend is None:
            mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        else:
            mixed, _ = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), backend)
        mixed = mixed.flatten(2).to(query.dtype)
        projected, dropout = module.to_out
        if encoder_hidden_states is None:
            return dropout(projected(mixed))
        images = hidden_states.shape[1]
        text_mixed = mixed[:, images:]
        if not module.context_pre_only:
            text_mixed = module.to_add_out(text_mixed)
        return dropout(projected(mixed[:, :images])), text_mixed

    @staticmethod
    def _heads(
        attn: Any, projected: tuple[Tensor, ...], norm_query: nn.Module | None, norm_key: nn.Module | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Three of (B, S, heads * head_dim) -> (B, heads, S, head_dim), queries and keys normalized."""
        query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in projected)
        if norm_query is not None:
            query = norm_query(query)
        if norm_key is not None:
            key = norm_key(key)
        return query, key, value
