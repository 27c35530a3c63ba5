"""Triton kernel for the backward of RMSNorm + RoPE: one launch from the joint gradients to the projections'.

A program handles all heads of one token of q, k or v, like the forward in `halfbyte.kernels.qk_rope.cuda`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.qk_rope.cuda import head_tile, rotate, stream_pair
from halfbyte.kernels.row_chunks import readable
from halfbyte.kernels.triton_launch import Launcher


@triton.jit
def _backward_kernel(
    query_grad,
    key_grad,
    value_grad,
    query0,
    query1,
    key0,
    key1,
    query_norm0,
    query_norm1,
    key_norm0,
    key_norm1,
    cos,
    sin,
    dquery0,
    dquery1,
    dkey0,
    dkey1,
    dvalue0,
    dvalue1,
    first_length,
    length,
    query_grad_batch,
    query_grad_row,
    query_grad_head,
    key_grad_batch,
    key_grad_row,
    key_grad_head,
    value_grad_batch,
    value_grad_row,
    value_grad_head,
    query0_batch,
    query1_batch,
    key0_batch,
    key1_batch,
    out0_batch,
    out1_batch,
    eps,
    QUERY0_ROW: tl.constexpr,
    QUERY1_ROW: tl.constexpr,
    KEY0_ROW: tl.constexpr,
    KEY1_ROW: tl.constexpr,
    OUT0_ROW: tl.constexpr,
    OUT1_ROW: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Writes one token of one projection's gradient. Grid: (length, B, parts), parts as in the forward.

    With the rotation R, the frozen norm weight w and r = 1 / sqrt(mean(x^2) + eps), per head:

        g  = w * (R^T dq)
        dx = r * (g - x * r^2 * mean(g * x))

    The gradients have run-time strides for batch, token and head, because attention backends lay them out
    differently. r is computed from x again; the forward saves nothing.
    """
    token = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    second_stream = token >= first_length
    row = (token - tl.where(second_stream, first_length, 0)).to(tl.int64)  # position in the token's stream
    joint = token.to(tl.int64)  # position in the joint sequence
    part = tl.program_id(2)
    if part == 0:
        grads = query_grad + batch * query_grad_batch + joint * query_grad_row
        grad_head = query_grad_head
        if second_stream:
            source = query1 + batch * query1_batch + row * QUERY1_ROW
            norm = query_norm1
            out = dquery1
        else:
            source = query0 + batch * query0_batch + row * QUERY0_ROW
            norm = query_norm0
            out = dquery0
    elif part == 1:
        grads = key_grad + batch * key_grad_batch + joint * key_grad_row
        grad_head = key_grad_head
        if second_stream:
            source = key1 + batch * key1_batch + row * KEY1_ROW
            norm = key_norm1
            out = dkey1
        else:
            source = key0 + batch * key0_batch + row * KEY0_ROW
            norm = key_norm0
            out = dkey0
    else:
        grads = value_grad + batch * value_grad_batch + joint * value_grad_row
        grad_head = value_grad_head
        # v passes through unchanged: neither of these is read.
        source = key0
        norm = key_norm0
        if second_stream:
            out = dvalue1
        else:
            out = dvalue0
    if second_stream:
        out += batch * out1_batch + row * OUT1_ROW
    else:
        out += batch * out0_batch + row * OUT0_ROW
    column = tl.arange(0, DIM)[None, :]
    # Loaded in the tile's full shape, as in the forward.
    spread = tl.zeros((GROUP, 1), tl.int32) + column
    if NORM:
        weight = tl.load(norm + spread, mask=(spread < HEAD_DIM) & (part < 2), other=0.0).to(tl.float32)
    if ROPE:
        cosine = tl.load(cos + joint * HEAD_DIM + spread, mask=(spread < HEAD_DIM) & (part < 2), other=0.0)
        sine = tl.load(sin + joint * HEAD_DIM + spread, mask=(spread < HEAD_DIM) & (part < 2), other=0.0)
    for group in tl.static_range(GROUPS):
        head = group * GROUP + tl.arange(0, GROUP)[:, None]
        inside = (head < HEADS) & (column < HEAD_DIM)
        place = grads + head.to(tl.int64) * grad_head + column
        grad = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if part < 2:
            if ROPE:
                # The forward normalizes and then rotates, so the backward undoes the rotation first.
                grad = rotate(grad, cosine, sine, GROUP, DIM, True)
            if NORM:
                x = tl.load(source + head * HEAD_DIM + column, mask=inside, other=0.0).to(tl.float32)
                factor = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
                grad *= weight  # g, 0 in the padding
                along = tl.sum(grad * x, axis=1)[:, None] / HEAD_DIM
                grad = factor * (grad - x * (factor * factor * along))
        tl.store(out + head * HEAD_DIM + column, grad.to(out.dtype.element_ty), mask=inside)


_launch_backward = Launcher(_backward_kernel)


def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    query_norms: Sequence[Tensor],
    key_norms: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """Returns the gradients of the streams' queries, then of their keys, contiguous (B, S_i, H*D_h)."""
    out = [torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (*queries, *keys)]
    count = len(queries)
    _backward(dq, dk, None, queries, keys, query_norms, key_norms, cos, sin, eps, (out[:count], out[count:]))
    return out


def qk_norm_rope_backward_into(
    out: Sequence[Sequence[Tensor]],
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    query_norms: Sequence[Tensor],
    key_norms: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> None:
    """Writes the gradients of the streams' queries, keys and values into out[part][stream].

    The three tensors of a stream must have the same strides.
    """
    _backward(dq, dk, dv, queries, keys, query_norms, key_norms, cos, sin, eps, out)


def _backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor | None,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    query_norms: Sequence[Tensor],
    key_norms: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    out: Sequence[Sequence[Tensor]],
) -> None:
    """Fills out[part][stream] for the parts query, key and, if dv is given, value."""
    batch, length, heads, head_dim = dq.shape
    if dq.numel() == 0:
        return
    dq, dk = readable(dq), readable(dk)
    # Without dv the grid has no third part, and the arguments for it are placeholders.
    value_grad = dk if dv is None else readable(dv)
    sources = (*stream_pair(queries), *stream_pair(keys))
    targets = [
        stream for part in out for stream in (part[0], part[-1])
    ]  # two streams per part, like the sources
    tile = head_tile(heads, head_dim)
    _launch_backward(
        (length, batch, len(out)),
        (
            dq,
            dk,
            value_grad,
            *sources,
            *((*stream_pair(query_norms), *stream_pair(key_norms)) if query_norms else sources),
            dq if cos is None else cos,
            dq if sin is None else sin,
            *targets,
            *(targets[:2] if dv is None else ()),
            queries[0].shape[1],
            length,
            *dq.stride()[:3],
            *dk.stride()[:3],
            *value_grad.stride()[:3],
            *(source.stride(0) for source in sources),
            targets[0].stride(0),
            targets[1].stride(0),
            eps,
        ),
        (
            *(source.stride(1) for source in sources),
            targets[0].stride(1),
            targets[1].stride(1),
            heads,
            head_dim,
            bool(query_norms),
            cos is not None,
            tile.group,
            tile.groups,
            tile.dim,
        ),
        num_warps=tile.warps,
    )
