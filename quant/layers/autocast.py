"""Queries and turns off autocast, for layers that compute in their own kernels."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from halfbyte.quant.layers.meta_autocast import current_dtype, no_autocast_on_meta

# The meta device, on which shapes are computed, has no autocast, and is_autocast_enabled raises for it. The
# availability is queried once, at import, because torch 2.11's compiler cannot trace the query.
_DEVICES = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))
_NOTHING = nullcontext()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Returns autocast's dtype on this kind of device; None where autocast is off."""
    if device_type == "meta":
        return current_dtype()
    if device_type in _DEVICES and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Returns a context in which operations keep their dtypes, even within an autocast region."""
    if device_type == "meta":
        return _NOTHING if current_dtype() is None else no_autocast_on_meta()
    # Entering a region takes some microseconds, even where it changes nothing.
    if device_type in _DEVICES and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NOTHING
