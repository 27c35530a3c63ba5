"""Registers RMSNorm + RoPE of q and k, from the projections into joint attention buffers, and the backward.

diffusers normalizes each stream, concatenates the streams and rotates them: three passes over q and k and one
over v. Here each value is read once and written once, to its place in the joint buffer.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import HAS_TRITON, is_eager
from halfbyte.kernels.qk_rope import reference
from halfbyte.kernels.rows import WEIGHT_DTYPES

MAX_HEAD_DIM = 256


class Stream(NamedTuple):
    """One stream of a joint attention: projections (B, S_i, H*D_h), which may be slices of a wider buffer.

    `query_norm` and `key_norm` are the RMSNorm weights (D_h,): both or
    neither. The backward needs no `value`.
    """

    query: Tensor
    key: Tensor
    value: Tensor | None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define(
    "qk_norm_rope(Tensor[] queries, Tensor[] keys, Tensor[] values, Tensor[] query_norms, Tensor[] key_norms,"
    " Tensor? cos, Tensor? sin, int heads, float eps) -> Tensor[]"
)
_library.define(
    "qk_norm_rope_backward(Tensor dq, Tensor dk, Tensor[] queries, Tensor[] keys, Tensor[] query_norms,"
    " Tensor[] key_norms, Tensor? cos, Tensor? sin, float eps) -> Tensor[]"
)


def _qk_norm_rope(
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
    joint = [
        reference.norm_rope(queries, query_norms, cos, sin, heads, eps),
        reference.norm_rope(keys, key_norms, cos, sin, heads, eps),
    ]
    if values:
        joint.append(torch.cat(list(values), dim=1).unflatten(-1, (heads, -1)))
    return joint


def _qk_norm_rope_backward(
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
    return [
        *reference.norm_rope_backward(dq, queries, query_norms, cos, sin, eps),
        *reference.norm_rope_backward(dk, keys, key_norms, cos, sin, eps),
    ]


_library.impl("qk_norm_rope", _qk_norm_rope, "CompositeExplicitAutograd")
_library.impl("qk_norm_rope_backward", _qk_norm_rope_backward, "CompositeExplicitAutograd")

if HAS_TRITON:
    from halfbyte.kernels.qk_rope import cuda, cuda_backward

    _library.impl("qk_norm_rope", cuda.qk_norm_rope, "CUDA")
    _library.impl("qk_norm_rope_backward", cuda_backward.qk_norm_rope_backward, "CUDA")


@torch.library.register_fake("halfbyte::qk_norm_rope", lib=_library)
def _fake_forward(
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
    batch, _, width = queries[0].shape
    shape = (batch, sum(query.shape[1] for query in queries), heads, width // heads)
    return [part[0].new_empty(shape) for part in (queries, keys, values) if part]


@torch.library.register_fake("halfbyte::qk_norm_rope_backward", lib=_library)
def _fake_backward(
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
    return [part.new_empty(part.shape) for part in (*queries, *keys)]


def _check_streams(streams: Sequence[Stream], heads: int) -> None:
    batch, _, width = streams[0].query.shape
    for number, stream in enumerate(streams):
        for name, part in (("query", stream.query), ("key", stream.key), ("value", stream.value)):
            if part is None:
                continue
            where = f"streams[{number}].{name}"
            if part.dtype not in WEIGHT_DTYPES:
                raise ValueError(
                    f"{where}: got {part.dtype}, expected one of {', '.join(map(str, WEIGHT_DTYPES))}"
                )
            if part.shape != (batch, stream.query.shape[1], width):
                expected = (batch, stream.query.shape[1], width)
                raise ValueError(
                    f"{where}: got shape {tuple(part.shape)}, expected (B, S, H*D_h) = {expected}"
                )
            if part.dtype != streams[0].query.dtype:
                raise ValueError(
                    f"{where}: got {part.dtype}, expected {streams[0].query.dtype} like the first query"
                )
        for name, weight in (("query_norm", stream.query_norm), ("key_norm", stream.key_norm)):
            if (weight is None) != (streams[0].query_norm is None):
                raise ValueError(f"streams[{number}].{name}: expected a weight in every stream or in none")
            if weight is not None and weight.shape != (width // heads,):
                raise ValueError(
                    f"streams[{number}].{name}: got shape {tuple(weight.shape)}, expected ({width // heads},)"
                )


def _width(streams: Sequence[Stream], heads: int) -> int:
    """Returns the streams' width H*D_h.

    Raises:
        ValueError: for a number of streams other than 1 or 2, or heads that do not fit the width.
    """
    if len(streams) not in (1, 2):
        raise ValueError(f"streams: got {len(streams)}, expected 1 or 2")
    query = streams[0].query
    if query.dim() != 3:
        raise ValueError(f"streams[0].query: got shape {tuple(query.shape)}, expected (B, S, H*D_h)")
    width = query.shape[-1]
    if heads < 1 or width % heads or (width // heads) % 2 or width // heads > MAX_HEAD_DIM:
        raise ValueError(
            f"heads: got {heads} for {width} columns, expected a divisor that leaves an even head dimension"
            f" of at most {MAX_HEAD_DIM}"
        )
    return width


def _check_rope(rope: tuple[Tensor, Tensor] | None, length: int, head_dim: int) -> None:
    for name, angles in zip(("cos", "sin"), rope or (), strict=False):
        if angles.dtype != torch.float32 or angles.shape != (length, head_dim) or not angles.is_contiguous():
            raise ValueError(
                f"rope: {name}: got {angles.dtype} {tuple(angles.shape)}, expected contiguous float32"
                f" (sum of S, D_h) = {(length, head_dim)}"
            )


def _norms(streams: Sequence[Stream]) -> tuple[list[Tensor], list[Tensor]]:
    queries = [stream.query_norm for stream in streams if stream.query_norm is not None]
    return queries, [stream.key_norm for stream in streams if stream.key_norm is not None]


def qk_norm_rope(
    streams: Sequence[Stream], rope: tuple[Tensor, Tensor] | None, *, heads: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the joint q, k, v (B, sum S_i, H, D_h) of one or two streams, in the given order.

    q and k pass through their stream's RMSNorm. If `rope` is (cos, sin), each (sum S_i, D_h) fp32, their
    interleaved pairs are then rotated, as diffusers' apply_rotary_emb does with use_real_unbind_dim=-1. All
    arithmetic is fp32 with one rounding. q and k are new and contiguous. v of two streams is too; v of a
    single stream is a view of its value.

    Raises:
        ValueError: if a shape, dtype or the number of heads does not fit.
    """
    width = _width(streams, heads)
    _check_streams(streams, heads)
    _check_rope(rope, sum(stream.query.shape[1] for stream in streams), width // heads)
    values = [stream.value for stream in streams if stream.value is not None]
    if len(values) != len(streams):
        raise ValueError("streams: got a stream without a value, expected a value in every stream")
    cos, sin = rope or (None, None)
    run: Callable[..., list[Tensor]] = torch.ops.halfbyte.qk_norm_rope.default
    if HAS_TRITON and streams[0].query.is_cuda and is_eager(streams[0].query):
        run = cuda.qk_norm_rope
    joint = run(
        [stream.query for stream in streams],
        [stream.key for stream in streams],
        values if len(values) > 1 else [],
        *_norms(streams),
        cos,
        sin,
        heads,
        eps,
    )
    query, key, *value = joint
    return query, key, value[0] if value else values[0].unflatten(-1, (heads, -1))


def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    streams: Sequence[Stream],
    rope: tuple[Tensor, Tensor] | None,
    *,
    eps: float = 1e-6,
    out: Sequence[tuple[Tensor, Tensor, Tensor]] | None = None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Returns each stream's (dquery, dkey, dvalue), (B, S_i, H*D_h), from the gradients of the joint q, k, v.

    dq, dk and dv are (B, sum S_i, H, D_h) with any strides. dquery and dkey are contiguous in the
    projections' dtype. dvalue is a view of dv if its strides allow it. With `out`, all three are written
    there; for each stream it holds three tensors (B, S_i, H*D_h), which may be slices of a wider buffer's
    rows. The RMSNorm weights are frozen and get no gradient.

    Raises:
        ValueError: if a shape, dtype, stride or the number of heads does not fit.
    """
    heads = dq.shape[2] if dq.dim() == 4 else 0
    width = _width(streams, heads)
    _check_streams(streams, heads)
    lengths = [stream.query.shape[1] for stream in streams]
    _check_rope(rope, sum(lengths), width // heads)
    expected = (streams[0].query.shape[0], sum(lengths), heads, width // heads)
    for name, grad in (("dq", dq), ("dk", dk), ("dv", dv)):
        if grad.shape != expected:
            raise ValueError(
                f"{name}: got shape {tuple(grad.shape)}, expected (B, sum S, H, D_h) = {expected}"
            )
    arguments = (
        [stream.query for stream in streams],
        [stream.key for stream in streams],
        *_norms(streams),
        *(rope or (None, None)),
        eps,
    )
    eager = HAS_TRITON and dq.is_cuda and is_eager(dq)
    if out is not None:
        _check_out(out, streams)
        if eager:
            cuda_backward.qk_norm_rope_backward_into(list(zip(*out, strict=True)), dq, dk, dv, *arguments)
            return list(out)
    run: Callable[..., list[Tensor]] = torch.ops.halfbyte.qk_norm_rope_backward.default
    if eager:
        run = cuda_backward.qk_norm_rope_backward
    grads = run(dq, dk, *arguments)
    count = len(streams)
    dvalues = [part.flatten(2) for part in dv.split(lengths, dim=1)]
    results = list(zip(grads[:count], grads[count:], dvalues, strict=True))
    if out is None:
        return results
    for slices, grads_of_stream in zip(out, results, strict=True):
        for target, grad in zip(slices, grads_of_stream, strict=True):
            target.copy_(grad)
    return list(out)


def _check_out(out: Sequence[tuple[Tensor, Tensor, Tensor]], streams: Sequence[Stream]) -> None:
    if len(out) != len(streams):
        raise ValueError(f"out: got {len(out)}, expected three slices for each of {len(streams)} streams")
    for number, (slices, stream) in enumerate(zip(out, streams, strict=True)):
        for part in slices:
            if part.shape != stream.query.shape or part.dtype not in WEIGHT_DTYPES:
                raise ValueError(
                    f"out[{number}]: got {part.dtype} {tuple(part.shape)}, expected {tuple(stream.query.shape)}"
                )
            if part.stride(-1) != 1 or part.stride() != slices[0].stride():
                raise ValueError(
                    f"out[{number}]: got strides {part.stride()}, expected contiguous rows and the same strides for"
                    " all three"
                )
