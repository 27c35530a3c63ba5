"""RMSNorm and rope of q and k on CUDA, between the streams' projections and the joint buffers, in one launch.

A program takes all heads of one token of q, k or v: cos and sin are loaded once for them. A group of heads is a tile,
with as many groups as the heads fill, so that no lane idles at 24 heads or 38.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_GROUPS = (8, 16, 32)  # heads in a tile
_LANE_VALUES = 8  # 16 bytes of a 16-bit type: what a lane loads at once


@triton.jit
def _turn(x, cos, sin, GROUP: tl.constexpr, DIM: tl.constexpr, BACK: tl.constexpr):
    """Interleaved pairs (a, b) -> (a cos - b sin, b cos + a sin); `BACK` is the transpose of that."""
    pairs = x * sin if BACK else x
    first, second = tl.split(tl.reshape(pairs, (GROUP, DIM // 2, 2)))
    if BACK:
        turned = tl.reshape(tl.join(second, -first), (GROUP, DIM))
    else:
        turned = tl.reshape(tl.join(-second, first), (GROUP, DIM)) * sin
    return x * cos + turned


@triton.jit
def _forward_kernel(
    query0,
    query1,
    key0,
    key1,
    value0,
    value1,
    query_norm0,
    query_norm1,
    key_norm0,
    key_norm1,
    cos,
    sin,
    query,
    key,
    value,
    first_length,
    length,
    heads,
    head_dim,
    eps,
    query0_batch,
    query0_row,
    query1_batch,
    query1_row,
    key0_batch,
    key0_row,
    key1_batch,
    key1_row,
    value0_batch,
    value0_row,
    value1_batch,
    value1_row,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
):
    token = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    second_stream = token >= first_length
    row = (token - tl.where(second_stream, first_length, 0)).to(tl.int64)
    if part == 0:
        out = query
        if second_stream:
            source = query1 + batch * query1_batch + row * query1_row
            norm = query_norm1
        else:
            source = query0 + batch * query0_batch + row * query0_row
            norm = query_norm0
    elif part == 1:
        out = key
        if second_stream:
            source = key1 + batch * key1_batch + row * key1_row
            norm = key_norm1
        else:
            source = key0 + batch * key0_batch + row * key0_row
            norm = key_norm0
    else:
        out = value
        norm = key_norm0
        if second_stream:
            source = value1 + batch * value1_batch + row * value1_row
        else:
            source = value0 + batch * value0_batch + row * value0_row
    out += (batch * length + token) * heads * head_dim
    column = tl.arange(0, DIM)[None, :]
    # Spread over a tile's shape, what heads share is loaded by each lane where it is needed.
    spread = tl.zeros((GROUP, 1), tl.int32) + column
    if NORM:
        weight = tl.load(norm + spread, mask=(spread < head_dim) & (part < 2), other=0.0).to(tl.float32)
    if ROPE:
        angle = token.to(tl.int64) * head_dim + spread
        cosine = tl.load(cos + angle, mask=(spread < head_dim) & (part < 2), other=0.0)
        sine = tl.load(sin + angle, mask=(spread < head_dim) & (part < 2), other=0.0)
    for group in tl.static_range(GROUPS):
        head = group * GROUP + tl.arange(0, GROUP)[:, None]
        inside = (head < heads) & (column < head_dim)
        x = tl.load(source + head * head_dim + column, mask=inside, other=0.0).to(tl.float32)
        if part < 2:
            if NORM:
                factor = tl.rsqrt(tl.sum(x * x, axis=1) / head_dim + eps)
                x = x * factor[:, None] * weight
            if ROPE:
                x = _turn(x, cosine, sine, GROUP, DIM, False)
        tl.store(out + head * head_dim + column, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    query_grad,
    key_grad,
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
    first_length,
    length,
    heads,
    head_dim,
    eps,
    query_grad_batch,
    query_grad_row,
    query_grad_head,
    key_grad_batch,
    key_grad_row,
    key_grad_head,
    query0_batch,
    query0_row,
    query1_batch,
    query1_row,
    key0_batch,
    key0_row,
    key1_batch,
    key1_row,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
):
    token = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    second_stream = token >= first_length
    row = (token - tl.where(second_stream, first_length, 0)).to(tl.int64)
    rows = tl.where(second_stream, length - first_length, first_length)
    joint = token.to(tl.int64)
    if tl.program_id(2) == 0:
        grads = query_grad + batch * query_grad_batch + joint * query_grad_row
        grad_head = query_grad_head
        if second_stream:
            source = query1 + batch * query1_batch + row * query1_row
            norm = query_norm1
            out = dquery1
        else:
            source = query0 + batch * query0_batch + row * query0_row
            norm = query_norm0
            out = dquery0
    else:
        grads = key_grad + batch * key_grad_batch + joint * key_grad_row
        grad_head = key_grad_head
        if second_stream:
            source = key1 + batch * key1_batch + row * key1_row
            norm = key_norm1
            out = dkey1
        else:
            source = key0 + batch * key0_batch + row * key0_row
            norm = key_norm0
            out = dkey0
    out += (batch * rows + row) * heads * head_dim
    column = tl.arange(0, DIM)[None, :]
    spread = tl.zeros((GROUP, 1), tl.int32) + column
    if NORM:
        weight = tl.load(norm + spread, mask=spread < head_dim, other=0.0).to(tl.float32)
    if ROPE:
        cosine = tl.load(cos + joint * head_dim + spread, mask=spread < head_dim, other=0.0)
        sine = tl.load(sin + joint * head_dim + spread, mask=spread < head_dim, other=0.0)
    for group in tl.static_range(GROUPS):
        head = group * GROUP + tl.arange(0, GROUP)[:, None]
        inside = (head < heads) & (column < head_dim)
        place = grads + head.to(tl.int64) * grad_head + column
        grad = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if ROPE:
            grad = _turn(grad, cosine, sine, GROUP, DIM, True)
        if NORM:
            x = tl.load(source + head * head_dim + column, mask=inside, other=0.0).to(tl.float32)
            factor = tl.rsqrt(tl.sum(x * x, axis=1) / head_dim + eps)[:, None]
            grad *= weight
            along = tl.sum(grad * x, axis=1)[:, None] / head_dim
            grad = factor * (grad - x * (factor * factor * along))
        tl.store(out + head * head_dim + column, grad.to(out.dtype.element_ty), mask=inside)


def _tile(heads: int, head_dim: int) -> dict[str, int]:
    """The group of heads with the least padding, then the fewest of them."""
    group = min(_GROUPS, key=lambda size: (triton.cdiv(heads, size) * size, -size))
    dim = triton.next_power_of_2(head_dim)
    return {
        "GROUP": group,
        "GROUPS": triton.cdiv(heads, group),
        "DIM": dim,
        "num_warps": max(1, min(8, group * dim // (32 * _LANE_VALUES))),
    }


def _readable(tensor: Tensor) -> Tensor:
    """The tensor, its last dimension contiguous: a slice as it lies, anything else copied."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _pair(streams: Sequence[Tensor]) -> list[Tensor]:
    """Two readable tensors: of one stream alone, the second is never reached."""
    first, last = streams[0], streams[-1]
    return [_readable(first), _readable(last)]


def _strides(tensors: Sequence[Tensor]) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:-1]]


def qk_norm_rope(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    query_norms: Sequence[Tensor],
    key_norms: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    eps: float,
) -> list[Tensor]:
    """Joint q, k and, of two streams, v (B, sum S_i, H, D_h)."""
    batch, first_length, width = queries[0].shape
    length = sum(query.shape[1] for query in queries)
    head_dim = width // heads
    sources = [*_pair(queries), *_pair(keys), *_pair(values or keys)]
    like = queries[0]
    joint = [
        torch.empty((batch, length, heads, head_dim), dtype=like.dtype, device=like.device)
        for _ in range(3 if values else 2)
    ]
    if joint[0].numel() == 0:
        return joint
    norms = [*_pair(query_norms), *_pair(key_norms)] if query_norms else [like] * 4
    with torch.cuda.device_of(like):
        _forward_kernel[(length, batch, len(joint))](
            *sources,
            *norms,
            like if cos is None else cos,
            like if sin is None else sin,
            joint[0],
            joint[1],
            joint[-1],
            first_length,
            length,
            heads,
            head_dim,
            eps,
            *_strides(sources),
            NORM=bool(query_norms),
            ROPE=cos is not None,
            **_tile(heads, head_dim),
        )
    return joint


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
    """The gradients of the streams' queries, then of their keys, contiguous (B, S_i, H*D_h)."""
    batch, length, heads, head_dim = dq.shape
    grads = [_readable(dq), _readable(dk)]
    sources = [*_pair(queries), *_pair(keys)]
    out = [torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (*queries, *keys)]
    if dq.numel() == 0:
        return out
    norms = [*_pair(query_norms), *_pair(key_norms)] if query_norms else [dq] * 4
    count = len(queries)
    with torch.cuda.device_of(dq):
        _backward_kernel[(length, batch, 2)](
            *grads,
            *sources,
            *norms,
            dq if cos is None else cos,
            dq if sin is None else sin,
            out[0],
            out[count - 1],
            out[count],
            out[-1],
            queries[0].shape[1],
            length,
            heads,
            head_dim,
            eps,
            *_strides(grads),
            *_strides(sources),
            NORM=bool(query_norms),
            ROPE=cos is not None,
            **_tile(heads, head_dim),
        )
    return out
