"""LayerNorm with modulation and the gated residual, forward and backward, as torch sees them.

Plain functions of tensors: nothing here is differentiable by itself (`elementwise_autograd` wraps what is), for the
blocks' own backward calls them one by one. Streams are (B, S, D), modulation is (B, D), a chunk of a wider row if it
likes. Streams may be slices; what comes out is contiguous. fp32 inside, one rounding on the way out.
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
_library.define(
    "gated_norm(Tensor x, Tensor gate, Tensor update, Tensor scale, Tensor shift, float eps, bool clip)"
    " -> (Tensor y, Tensor normed)"
)
_library.define(
    "gated_norm_backward(Tensor dnormed, Tensor y, Tensor gate, Tensor scale, Tensor? residual_grad, float eps)"
    " -> (Tensor dx, Tensor dupdate)"
)

REFERENCE: Mapping[str, Callable[..., Any]] = {
    "layer_norm_modulate": reference.layer_norm_modulate,
    "layer_norm_modulate_backward": reference.layer_norm_modulate_backward,
    "layer_norm_modulate_grads": reference.layer_norm_modulate_grads,
    "gated_residual": reference.gated_residual,
    "gated_residual_backward": reference.gated_residual_backward,
    "gated_residual_grads": reference.gated_residual_grads,
    "gated_norm": reference.gated_norm,
    "gated_norm_backward": reference.gated_norm_backward,
}
CUDA: dict[str, Callable[..., Any]] = {}
if HAS_TRITON:
    from halfbyte.kernels.modulation import cuda as modulation_triton
    from halfbyte.kernels.modulation import cuda_gate as gated_residual_triton

    for _name in REFERENCE:
        _of_gate = _name in ("gated_residual_backward", "gated_residual_grads")
        CUDA[_name] = getattr(gated_residual_triton if _of_gate else modulation_triton, _name)

for _name, _function in REFERENCE.items():
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    if HAS_TRITON:
        _library.impl(_name, CUDA[_name], "CUDA")


def _run(name: str, stream: Tensor, *arguments: Any) -> Any:
    """The op of that name, by way of the dispatcher only where somebody watches or torch computes it."""
    if HAS_TRITON and stream.is_cuda and is_eager(stream):
        return CUDA[name](stream, *arguments)
    return getattr(torch.ops.halfbyte, name).default(stream, *arguments)


def _run_into(out: Tensor | None, name: str, stream: Tensor, *arguments: Any, place: int = 0) -> Any:
    """The same, with the result at `place` in `out` where that is given: by a copy unless Triton writes it there."""
    if out is None:
        return _run(name, stream, *arguments)
    _check_stream("out", out, stream.shape)
    if out.stride(-1) != 1:
        raise ValueError(f"out: got strides {out.stride()}, expected rows that are contiguous")
    if HAS_TRITON and stream.is_cuda and is_eager(stream):
        return CUDA[name](stream, *arguments, out)
    results = _run(name, stream, *arguments)
    if isinstance(results, Tensor):
        return out.copy_(results)
    out.copy_(results[place])
    return (*results[:place], out, *results[place + 1 :])


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


@torch.library.register_fake("halfbyte::gated_norm", lib=_library)
def _fake_gated_norm(
    x: Tensor, gate: Tensor, update: Tensor, scale: Tensor, shift: Tensor, eps: float, clip: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.register_fake("halfbyte::gated_norm_backward", lib=_library)
def _fake_gated_norm_backward(
    dnormed: Tensor, y: Tensor, gate: Tensor, scale: Tensor, residual_grad: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape)


def _check_stream(name: str, stream: Tensor, shape: torch.Size | None = None) -> None:
    if stream.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name}: got {stream.dtype}, expected one of {', '.join(map(str, WEIGHT_DTYPES))}")
    if stream.dim() != 3:
        raise ValueError(f"{name}: got shape {tuple(stream.shape)}, expected (B, S, D)")
    if shape is not None and stream.shape != shape:
        raise ValueError(
            f"{name}: got shape {tuple(stream.shape)}, expected {tuple(shape)} as the stream has"
        )


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
    """LN(x) * (1 + scale) + shift, LN without weights of its own.

    x (B, S, D), scale and shift (B, D) -> (B, S, D) in x's dtype, or in `out`, a slice of a wider
    buffer's rows for one. ValueError where a shape or dtype differs.
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
    """dx (B, S, D) of `layer_norm_modulate` in x's dtype; the statistics are computed from x again.

    `residual_grad` (B, S, D) is what reaches x by the block's residual branch: it is added in the same pass.
    """
    _check_norm_backward(dy, x, scale, residual_grad)
    return _run("layer_norm_modulate_backward", dy, x, scale, residual_grad, eps)


def layer_norm_modulate_grads(
    dy: Tensor, x: Tensor, scale: Tensor, residual_grad: Tensor | None = None, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dshift): as `layer_norm_modulate_backward`, where modulation learns too.

    dscale and dshift are (B, D) in scale's dtype, summed in fp32 and in the same order every time.
    """
    _check_norm_backward(dy, x, scale, residual_grad)
    return _run("layer_norm_modulate_grads", dy, x, scale, residual_grad, eps)


def gated_residual(
    x: Tensor, gate: Tensor, update: Tensor, *, clip: bool = False, out: Tensor | None = None
) -> Tensor:
    """x + gate * update: x and update (B, S, D), gate (B, D) -> (B, S, D) in x's dtype, or in `out`.

    `clip` holds an fp16 result within +-65504, as diffusers does behind FLUX's single blocks and text streams;
    the other dtypes reach further than that. The gradient passes by the clip: that of x is dy itself.
    """
    _check_stream("x", x)
    _check_stream("update", update, x.shape)
    _check_modulation("gate", gate, x)
    return _run_into(out, "gated_residual", x, gate, update, clip)


def gated_residual_backward(dy: Tensor, gate: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The gradient of `gated_residual`'s update, gate * dy, in dy's dtype, or in `out`."""
    _check_stream("dy", dy)
    _check_modulation("gate", gate, dy)
    return _run_into(out, "gated_residual_backward", dy, gate)


def gated_residual_grads(
    dy: Tensor, gate: Tensor, update: Tensor, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(the gradient of the update, in `out` where given; dgate (B, D) in gate's dtype), where modulation learns too."""
    _check_stream("dy", dy)
    _check_stream("update", update, dy.shape)
    _check_modulation("gate", gate, dy)
    return _run_into(out, "gated_residual_grads", dy, gate, update)


def gated_norm(
    x: Tensor,
    gate: Tensor,
    update: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float = 1e-6,
    clip: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = gated_residual(x, gate, update) and layer_norm_modulate(y, scale, shift) in one pass: (y, normed).

    The norm sees y as it is stored, so a backward that reads y again finds the same statistics. normed is written
    into `out` where given.
    """
    _check_stream("x", x)
    _check_stream("update", update, x.shape)
    for name, modulation in (("gate", gate), ("scale", scale), ("shift", shift)):
        _check_modulation(name, modulation, x)
    return _run_into(out, "gated_norm", x, gate, update, scale, shift, eps, clip, place=1)


def gated_norm_backward(
    dnormed: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    residual_grad: Tensor | None = None,
    *,
    eps: float = 1e-6,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dx, dupdate) of `gated_norm` from its y, in y's dtype; `residual_grad` is what reaches y from elsewhere.

    dx is y's whole gradient, dupdate is gate * dx, written into `out` where given.
    """
    _check_norm_backward(dnormed, y, scale, residual_grad)
    _check_modulation("gate", gate, y)
    return _run_into(out, "gated_norm_backward", dnormed, y, gate, scale, residual_grad, eps, place=1)
