"""Attention over one or two streams as the blocks' own functions run it: projections in, gradients of them out."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from halfbyte.kernels.attention.ops import attention, attention_backward
from halfbyte.kernels.qk_rope.ops import Stream, qk_norm_rope, qk_norm_rope_backward

Rotary = tuple[Tensor, Tensor]  # cosines and sines, each (S, head_dim) fp32


@dataclass(frozen=True, eq=False)
class JointAttention:
    """What a block attends with."""

    heads: int
    head_dim: int
    norms: Sequence[
        tuple[Tensor | None, Tensor | None]
    ]  # RMSNorm weights of queries and keys, a pair a stream
    norm_eps: float
    rotary: Rotary | None
    backend: str

    def streams(self, projected: Sequence[Tensor], batch: int) -> list[Stream]:
        """Each stream's (B * S_i, >= 3 D) product as queries, keys and values (B, S_i, D)."""
        width = self.heads * self.head_dim
        parts = []
        for product, (query_norm, key_norm) in zip(projected, self.norms, strict=True):
            whole = product.view(batch, -1, product.shape[1])
            query, key, value = whole[..., : 3 * width].chunk(3, dim=-1)
            parts.append(Stream(query, key, value, query_norm, key_norm))
        return parts

    def joint(self, streams: Sequence[Stream]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all tokens, (B, S, H, D_h) each."""
        return qk_norm_rope(streams, self.rotary, heads=self.heads, eps=self.norm_eps)

    def attend(self, streams: Sequence[Stream]) -> tuple[Tensor, Tensor]:
        """The output (B, S, H, D_h) and the softmax's statistics."""
        return attention(*self.joint(streams), self.backend)

    def backward(
        self,
        grad: Tensor,
        streams: Sequence[Stream],
        out: Tensor,
        statistics: Tensor,
        rooms: Sequence[Tensor],
    ) -> None:
        """Fills the first columns of each stream's room (B, S_i, >= 3 D) with the gradients of its queries, keys and
        values, from that of the output (B, S, H * D_h)."""
        grads = attention_backward(
            grad.unflatten(-1, (self.heads, -1)), *self.joint(streams), out, statistics, self.backend
        )
        width = self.heads * self.head_dim
        slices = []
        for room in rooms:
            query, key, value = room[..., : 3 * width].split(width, dim=-1)
            slices.append((query, key, value))
        qk_norm_rope_backward(*grads, streams, self.rotary, eps=self.norm_eps, out=slices)
