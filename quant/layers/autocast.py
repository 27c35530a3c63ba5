"""What autocast asks of a layer that computes by itself."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from halfbyte.quant.layers.meta_autocast import current_dtype, no_autocast_on_meta

# The meta device, on which shapes are worked out, has no autocast, and raises when asked. Asked here once, for torch
# 2.11's compiler cannot trace the question.
_DEVICES = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))
_NOTHING = nullcontext()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast computes in on this kind of device; None where it is off."""
    if device_type == "meta":
        return current_dtype()
    if device_type in _DEVICES and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """What is computed within keeps its dtypes, whatever region surrounds it."""
    if device_type == "meta":
        return _NOTHING if current_dtype() is None else no_autocast_on_meta()
    # A region costs some microseconds to enter, even where it changes nothing.
    if device_type in _DEVICES and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NOTHING
