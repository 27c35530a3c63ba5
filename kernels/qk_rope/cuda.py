"""Triton kernel for RMSNorm + RoPE of q and k: one launch from the projections into the joint buffers.

A program handles all heads of one token of q, k or v, so it loads cos, sin and the norm weight once for all
heads. It processes the heads in groups, each a register tile (GROUP, DIM). The group size is chosen so that
hardly any lane idles, also at 24 or 38 heads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.row_chunks import readable
from halfbyte.kernels.triton_launch import Launcher

_GROUPS = (8, 16, 32)  # heads in a tile
_LANE_VALUES = 8  # 16 bytes of a 16-bit dtype: one vectorized load of a lane


class HeadTile(NamedTuple):
    """The tiles of one token: `groups` tiles of `group` heads, each head padded to `dim` values."""

    group: int
    groups: int
    dim: int
    warps: int


@triton.jit
def rotate(x, cos, sin, GROUP: tl.constexpr, DIM: tl.constexpr, BACK: tl.constexpr):
    """Rotates interleaved pairs (a, b) -> (a cos - b sin, b cos + a sin); with `BACK` applies the transpose.

    x, cos and sin are (GROUP, DIM) fp32. The transpose multiplies with sin first and swaps then, see
    `halfbyte.kernels.qk_rope.reference`: this holds even if the two values of a pair have different angles.
    """
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
    query0_batch,
    query1_batch,
    key0_batch,
    key1_batch,
    value0_batch,
    value1_batch,
    eps,
    QUERY0_ROW: tl.constexpr,
    QUERY1_ROW: tl.constexpr,
    KEY0_ROW: tl.constexpr,
    KEY1_ROW: tl.constexpr,
    VALUE0_ROW: tl.constexpr,
    VALUE1_ROW: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Writes one token of one joint buffer (B, length, HEADS, HEAD_DIM). Grid: (length, B, parts).

    Suffixes 0 and 1 name the stream; the first `first_length` joint tokens belong to stream 0. Part 0 is q, 1
    is k and 2 is v, which is only copied. With a single stream, the arguments of stream 1 repeat stream 0 and
    are never read.
    """
    token = tl.program_id(0)  # its position in the joint sequence
    batch = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    second_stream = token >= first_length
    row = (token - tl.where(second_stream, first_length, 0)).to(tl.int64)  # its position in its stream
    if part == 0:
        out = query
        if second_stream:
            source = query1 + batch * query1_batch + row * QUERY1_ROW
            norm = query_norm1
        else:
            source = query0 + batch * query0_batch + row * QUERY0_ROW
            norm = query_norm0
    elif part == 1:
        out = key
        if second_stream:
            source = key1 + batch * key1_batch + row * KEY1_ROW
            norm = key_norm1
        else:
            source = key0 + batch * key0_batch + row * KEY0_ROW
            norm = key_norm0
    else:
        out = value
        norm = key_norm0
        if second_stream:
            source = value1 + batch * value1_batch + row * VALUE1_ROW
        else:
            source = value0 + batch * value0_batch + row * VALUE0_ROW
    out += (batch * length + token) * HEADS * HEAD_DIM
    column = tl.arange(0, DIM)[None, :]
    # Weight, cos and sin are the same for all heads. Loading them in the tile's full shape gives each lane
    # its own copy; a (1, DIM) load would have to be exchanged between lanes to broadcast it.
    spread = tl.zeros((GROUP, 1), tl.int32) + column
    if NORM:
        weight = tl.load(norm + spread, mask=(spread < HEAD_DIM) & (part < 2), other=0.0).to(tl.float32)
    if ROPE:
        angle = token.to(tl.int64) * HEAD_DIM + spread
        cosine = tl.load(cos + angle, mask=(spread < HEAD_DIM) & (part < 2), other=0.0)
        sine = tl.load(sin + angle, mask=(spread < HEAD_DIM) & (part < 2), other=0.0)
    for group in tl.static_range(GROUPS):
        head = group * GROUP + tl.arange(0, GROUP)[:, None]
        inside = (head < HEADS) & (column < HEAD_DIM)
        x = tl.load(source + head * HEAD_DIM + column, mask=inside, other=0.0).to(tl.float32)
        if part < 2:
            if NORM:
                # One mean square per head. The padding past HEAD_DIM was loaded as 0.
                factor = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)
                x = x * factor[:, None] * weight
            if ROPE:
                x = rotate(x, cosine, sine, GROUP, DIM, False)
        tl.store(out + head * HEAD_DIM + column, x.to(out.dtype.element_ty), mask=inside)


_launch_forward = Launcher(_forward_kernel)


def head_tile(heads: int, head_dim: int) -> HeadTile:
    """Returns the tile whose groups have the least padding, then the fewest groups."""
    group = min(_GROUPS, key=lambda size: (triton.cdiv(heads, size) * size, -size))
    dim = triton.next_power_of_2(head_dim)
    warps = max(1, min(8, group * dim // (32 * _LANE_VALUES)))
    return HeadTile(group, triton.cdiv(heads, group), dim, warps)


def stream_pair(streams: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns two readable tensors; for a single stream the second repeats the first and is never read."""
    first = readable(streams[0])
    return first, readable(streams[1]) if len(streams) > 1 else first


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
    """Returns joint q, k and, if `values` is not empty, v, each (B, sum S_i, H, D_h).

    `halfbyte.kernels.qk_rope.reference.norm_rope` defines the result. `query_norms` and `key_norms` are empty
    for no norm; cos and sin are None for no RoPE.
    """
    batch, first_length, width = queries[0].shape
    length = sum(query.shape[1] for query in queries)
    head_dim = width // heads
    like = queries[0]
    shape = (batch, length, heads, head_dim)
    joint = [torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(3 if values else 2)]
    if joint[0].numel() == 0:
        return joint
    sources = (*stream_pair(queries), *stream_pair(keys), *stream_pair(values or keys))
    tile = head_tile(heads, head_dim)
    _launch_forward(
        (length, batch, len(joint)),
        (
            *sources,
            *((*stream_pair(query_norms), *stream_pair(key_norms)) if query_norms else sources[:4]),
            like if cos is None else cos,
            like if sin is None else sin,
            joint[0],
            joint[1],
            joint[-1],
            first_length,
            length,
            *(source.stride(0) for source in sources),
            eps,
        ),
        (
            *(source.stride(1) for source in sources),
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
    return joint
