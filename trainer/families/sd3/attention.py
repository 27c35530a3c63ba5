"""SD3's attention processor for blocks that run layer by layer.

Queries, keys and values of a stream share their input. `lora_linears` computes their adapters' x A^T in one
product. Without adapters the outputs are bitwise identical to diffusers' own. Autograd computes the backward;
blocks that run as one function use `blocks.attention` instead.
"""

from typing import Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn

from halfbyte.kernels.attention.ops import attention, trainable_backend
from halfbyte.quant.lora.layers import lora_linears


class SD3SharedInputAttention(JointAttnProcessor2_0):
    """Computes queries, keys and values of a stream in one pass over its tokens."""

    def __init__(self, backend: str | None = None) -> None:
        """Stores the backend, one of `halfbyte.kernels.attention.ops`.

        None leaves the choice to torch, except in training on a GPU: torch might then take cuDNN, whose
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
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends over the image's tokens (B, S, D), in joint attention together with the text's (B, T, D).

        Returns tensors of the same shapes: the image's, in joint attention a pair (image, text).
        """
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
            # SD3's joint sequence has the image first; it has no rope.
            query, key, value = (
                torch.cat(pair, dim=2) for pair in zip((query, key, value), text, strict=True)
            )
        backend = self.backend or trainable_backend(query)
        # torch's function takes (B, heads, S, head_dim), ours (B, S, heads, head_dim).
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
        """Splits (B, S, heads * head_dim) into heads (B, heads, S, head_dim); normalizes queries and keys."""
        query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in projected)
        if norm_query is not None:
            query = norm_query(query)
        if norm_key is not None:
            key = norm_key(key)
        return query, key, value
