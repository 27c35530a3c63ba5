"""Forward and backward of attention over the tokens of one or two streams, for the hand-written blocks.

For each stream i, with its projection [q, k, v] (B, S_i, 3 D) and D = H * D_h:

    Q = rope(concat_i rmsnorm(q_i))     (B, S, H, D_h), S = sum of S_i
    K = rope(concat_i rmsnorm(k_i))
    V = concat_i v_i
    out = softmax(Q K^T / sqrt(D_h)) V

FLUX has rope and the text stream first. SD3 has the image stream first, no rope, and RMSNorm only from 3.5
on. Q, K and V cost little next to the attention itself, so they are not kept: the backward recomputes them
from the projections.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from halfbyte.kernels.attention.ops import attention, attention_backward
from halfbyte.kernels.qk_rope.ops import Stream, qk_norm_rope, qk_norm_rope_backward

Rotary = tuple[Tensor, Tensor]  # cosines and sines, each (S, head_dim) fp32


@dataclass(frozen=True, eq=False)
class JointAttention:
    """One block's attention: its head sizes, RMSNorm weights, rotary embedding and backend."""

    heads: int
    head_dim: int
    # RMSNorm weights (D_h,) of queries and keys, one pair per stream; None without a norm
    norms: Sequence[tuple[Tensor | None, Tensor | None]]
    norm_eps: float
    rotary: Rotary | None
    backend: str

    def streams(self, projected: Sequence[Tensor], batch: int) -> list[Stream]:
        """Splits each stream's projection (B * S_i, >= 3 D) into views of q, k and v (B, S_i, D)."""
        width = self.heads * self.head_dim
        parts = []
        for product, (query_norm, key_norm) in zip(projected, self.norms, strict=True):
            # FLUX's single block has the MLP's hidden columns after the first 3 D.
            whole = product.view(batch, -1, product.shape[1])
            query, key, value = whole[..., : 3 * width].chunk(3, dim=-1)
            parts.append(Stream(query, key, value, query_norm, key_norm))
        return parts

    def joint(self, streams: Sequence[Stream]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns Q, K and V of all tokens, (B, S, H, D_h) each, after RMSNorm and rope."""
        return qk_norm_rope(streams, self.rotary, heads=self.heads, eps=self.norm_eps)

    def attend(self, streams: Sequence[Stream]) -> tuple[Tensor, Tensor]:
        """Returns the output (B, S, H, D_h) and the softmax statistics (log-sum-exp) for the backward."""
        return attention(*self.joint(streams), self.backend)

    def backward(
        self,
        grad: Tensor,
        streams: Sequence[Stream],
        out: Tensor,
        statistics: Tensor,
        rooms: Sequence[Tensor],
    ) -> None:
        """Writes dL/d[q, k, v] into the first 3 D columns of each stream's room (B, S_i, >= 3 D).

        grad: dL/dout (B, S, H * D_h). out, statistics: as `attend` returned them.
        """
        # dL/dout -> dL/dQ, dL/dK, dL/dV of all tokens. Q, K and V are recomputed here and freed right after.
        grads = attention_backward(
            grad.unflatten(-1, (self.heads, -1)), *self.joint(streams), out, statistics, self.backend
        )
        # Views of each room: the kernel below writes dq_i, dk_i and dv_i straight into the gradient buffer
        # that the projection's backward reads, without a concatenation.
        width = self.heads * self.head_dim
        slices = []
        for room in rooms:
            query, key, value = room[..., : 3 * width].split(width, dim=-1)
            slices.append((query, key, value))
        # dL/dQ, dL/dK -> through the transposes of rope and RMSNorm -> dq_i, dk_i; dv_i is a copy.
        qk_norm_rope_backward(*grads, streams, self.rotary, eps=self.norm_eps, out=slices)
