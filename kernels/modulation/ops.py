"""Registers LayerNorm with modulation and the gated residual with torch, forward and backward.

The functions are not differentiable; the blocks' own backward calls the `_backward` and `_grads` variants.
(`tests/support/elementwise_autograd.py` wraps them for tests that need autograd.)

Streams are (B, S, D) and may be slices. Modulation (scale, shift, gate) is (B, D),
possibly a slice of a wider row. Results are contiguous unless `out` is given. All
arithmetic is fp32 with one rounding of each result.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import HAS_TRITON, is_eager
from halfbyte.kernels.modulation import reference
from halfbyte.kernels.rows import WEIGHT_DTYPES

_BACKWARD = "Tensor dy, Tensor x, Tensor scale, Tensor? residual_grad, float eps"

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define("layer_norm_modulate(Tensor x, Tensor scale, Tensor shift, float eps) -> Tensor")
_library.define(f"layer_norm_modulate_backward({_BACKWARD}) -> Tensor")
_library.define(f"layer_norm_modulate_grads({_BACKWARD}) -> (Tensor dx, Tensor dscale, Tensor dshift)")
_library.define("gated_residual(Tensor x, Tensor gate, Tensor update, bool clip) -> Tensor")
_library.define("gated_residual_backward(Tensor dy, Tensor gate) -> Tensor")
_library.define(
    "gated_residual_grads(Tensor dy, Tensor gate, Tensor update) -> (Tensor dupdate, Tensor dgate)"
)

REFERENCE: Mapping[str, Callable[..., Any]] = {
    "layer_norm_modulate": reference.layer_norm_modulate,
    "layer_norm_modulate_backward": reference.layer_norm_modulate_backward,
    "layer_norm_modulate_grads": reference.layer_norm_modulate_grads,
    "gated_residual": reference.gated_residual,
    "gated_residual_backward": reference.gated_residual_backward,
    "gated_residual_grads": reference.gated_residual_grads,
}
CUDA: dict[str, Callable[..., Any]] = {}
if HAS_TRITON:
    from halfbyte.kernels.modulation import cuda, cuda_gate

    for _name in REFERENCE:
        _module = cuda_gate if _name in ("gated_residual_backward", "gated_residual_grads") else cuda
        CUDA[_name] = getattr(_module, _name)

for _name, _function in REFERENCE.items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    if HAS_TRITON:
        _library.impl(_name, CUDA[_name], "CUDA")


def _run(name: str, stream: Tensor, *arguments: Any) -> Any:
    """Runs the op `name`: directly if it is eager on CUDA, otherwise through the dispatcher."""
    if HAS_TRITON and stream.is_cuda and is_eager(stream):
        return CUDA[name](stream, *arguments)
    return getattr(torch.ops.halfbyte, name).default(stream, *arguments)


def _run_into(out: Tensor | None, name: str, stream: Tensor, *arguments: Any) -> Any:
    """Runs the op like `_run`, with its first result in `out` if given.

    Triton writes into `out`; results of the dispatcher are copied there.
    """
    if out is None:
        return _run(name, stream, *arguments)
    _check_stream("out", out, stream.shape)
    if out.stride(-1) != 1:
        raise ValueError(f"out: got strides {out.stride()}, expected contiguous rows (last stride 1)")
    if HAS_TRITON and stream.is_cuda and is_eager(stream):
        return CUDA[name](stream, *arguments, out)
    results = _run(name, stream, *arguments)
    if isinstance(results, Tensor):
        return out.copy_(results)
    out.copy_(results[0])
    return (out, *results[1:])


@torch.library.register_fake("halfbyte::layer_norm_modulate", lib=_library)
def _fake_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("halfbyte::layer_norm_modulate_backward", lib=_library)
def _fake_norm_backward(
    dy: Tensor, x: Tensor, scale: Tensor, residual_grad: Tensor | None, eps: float
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("halfbyte::layer_norm_modulate_grads", lib=_library)
def _fake_norm_grads(
    dy: Tensor, x: Tensor, scale: Tensor, residual_grad: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


@torch.library.register_fake("halfbyte::gated_residual", lib=_library)
def _fake_residual(x: Tensor, gate: Tensor, update: Tensor, clip: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("halfbyte::gated_residual_backward", lib=_library)
def _fake_residual_backward(dy: Tensor, gate: Tensor) -> Tensor:
    return dy.new_empty(dy.shape)


@torch.library.register_fake("halfbyte::gated_residual_grads", lib=_library)
def _fake_residual_grads(dy: Tensor, gate: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape), gate.new_empty(gate.shape)


def _check_stream(name: str, stream: Tensor, shape: torch.Size | None = None) -> None:
    if stream.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name}: got {stream.dtype}, expected one of {', '.join(map(str, WEIGHT_DTYPES))}")
    if stream.dim() != 3:
        raise ValueError(f"{name}: got shape {tuple(stream.shape)}, expected (B, S, D)")
    if shape is not None and stream.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(stream.shape)}, expected {tuple(shape)} like the stream")


def _check_modulation(name: str, modulation: Tensor, stream: Tensor) -> None:
    expected = (stream.shape[0], stream.shape[2])
    if modulation.dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"{name}: got {modulation.dtype}, expected one of {', '.join(map(str, WEIGHT_DTYPES))}"
        )
    if modulation.shape != expected:
        raise ValueError(f"{name}: got shape {tuple(modulation.shape)}, expected (B, D) = {expected}")


def layer_norm_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, out: Tensor | None = None
) -> Tensor:
    """Returns LN(x) * (1 + scale) + shift, where LN has no weights of its own.

    x is (B, S, D); scale and shift are (B, D). The result is (B, S, D) in x's dtype, or `out`, which may be a
    slice of a wider buffer's rows.

    Raises:
        ValueError: if a shape or dtype does not fit.
    """
    _check_stream("x", x)
    _check_modulation("scale", scale, x)
    _check_modulation("shift", shift, x)
    return _run_into(out, "layer_norm_modulate", x, scale, shift, eps)


def _check_norm_backward(dy: Tensor, x: Tensor, scale: Tensor, residual_grad: Tensor | None) -> None:
    _check_stream("x", x)
    _check_stream("dy", dy, x.shape)
    _check_modulation("scale", scale, x)
    if residual_grad is not None:
        _check_stream("residual_grad", residual_grad, x.shape)


def layer_norm_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, residual_grad: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """Returns dx (B, S, D) of `layer_norm_modulate` in x's dtype; it computes the statistics from x again.

    `residual_grad` (B, S, D) is the gradient that reaches x through the block's residual branch. It is added
    in the same pass, before the rounding.
    """
    _check_norm_backward(dy, x, scale, residual_grad)
    return _run("layer_norm_modulate_backward", dy, x, scale, residual_grad, eps)


def layer_norm_modulate_grads(
    dy: Tensor, x: Tensor, scale: Tensor, residual_grad: Tensor | None = None, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (dx, dscale, dshift): `layer_norm_modulate_backward` for trained modulation.

    dscale and dshift are (B, D) in scale's dtype. They are summed in fp32, in the same order in every run.
    """
    _check_norm_backward(dy, x, scale, residual_grad)
    return _run("layer_norm_modulate_grads", dy, x, scale, residual_grad, eps)


def gated_residual(
    x: Tensor, gate: Tensor, update: Tensor, *, clip: bool = False, out: Tensor | None = None
) -> Tensor:
    """Returns x + gate * update in x's dtype, or in `out`; x and update are (B, S, D), gate is (B, D).

    `clip` limits an fp16 result to +-65504, as diffusers does after FLUX's single blocks and
    text streams. It has no effect on other dtypes, whose range is larger. The backward
    ignores the clip: the gradient of x is dy itself.
    """
    _check_stream("x", x)
    _check_stream("update", update, x.shape)
    _check_modulation("gate", gate, x)
    return _run_into(out, "gated_residual", x, gate, update, clip)


def gated_residual_backward(dy: Tensor, gate: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Returns the gradient of `gated_residual`'s update, gate * dy, in dy's dtype, or in `out`."""
    _check_stream("dy", dy)
    _check_modulation("gate", gate, dy)
    return _run_into(out, "gated_residual_backward", dy, gate)


def gated_residual_grads(
    dy: Tensor, gate: Tensor, update: Tensor, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns (dupdate, dgate) of `gated_residual` for trained modulation.

    dupdate (B, S, D) is in `out` if given; dgate (B, D) is in gate's dtype.
    """
    _check_stream("dy", dy)
    _check_stream("update", update, dy.shape)
    _check_modulation("gate", gate, dy)
    return _run_into(out, "gated_residual_grads", dy, gate, update)
