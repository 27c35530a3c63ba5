"""Emulates CUDA autocast for tensors on meta, where memory is planned and torch has no autocast.

Only the casts that decide how much memory the backward keeps: products in the compute dtype, normalizations
in fp32. torch's own lists are in its documentation of autocast.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PRODUCTS = frozenset(
    (
        torch.nn.functional.linear,
        torch.nn.functional.conv2d,
        torch.nn.functional.scaled_dot_product_attention,
        torch.matmul,
        torch.bmm,
        torch.mm,
        torch.addmm,
        Tensor.matmul,
        Tensor.__matmul__,
    )
)
_NORMALIZATIONS = frozenset(
    (
        torch.nn.functional.layer_norm,
        torch.nn.functional.group_norm,
        torch.nn.functional.softmax,
        torch.nn.functional.mse_loss,
        torch.softmax,
        Tensor.pow,
        torch.pow,
        torch.rsqrt,
        Tensor.rsqrt,
    )
)

_current: torch.dtype | None = None


class _Casts(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Implements torch's hook: casts the arguments of the listed functions."""
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            args, kwargs = _cast(args, kwargs, self._dtype)
        elif func in _NORMALIZATIONS:
            args, kwargs = _cast(args, kwargs, torch.float32)
        return func(*args, **kwargs)


@contextmanager
def autocast_on_meta(dtype: torch.dtype) -> Iterator[None]:
    """Makes our layers and torch's functions treat tensors on meta like CUDA tensors under autocast."""
    global _current
    before, _current = _current, dtype
    try:
        with _Casts(dtype):
            yield
    finally:
        _current = before


@contextmanager
def no_autocast_on_meta() -> Iterator[None]:
    """Turns off all casts inside the block, even within `autocast_on_meta`."""
    global _current
    before, _current = _current, None
    try:
        # Disables modes as well as subclasses: an active mode slows down every call, and has nothing to cast
        # here.
        with torch._C.DisableTorchFunction():
            yield
    finally:
        _current = before


def current_dtype() -> torch.dtype | None:
    """Returns the compute dtype of `autocast_on_meta`; None outside of it."""
    return _current


def _cast(
    args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(_to(arg, dtype) for arg in args), {name: _to(arg, dtype) for name, arg in kwargs.items()}


def _to(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_meta and value.is_floating_point():
        return value.to(dtype)
    return value
