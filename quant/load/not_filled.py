"""Skips the initialization of the weights of models that are built on meta."""

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import initialization

# While transformers builds a model, its own functions take the place of torch's.
_INITIALIZERS = (nn.init.__name__, initialization.__name__)


class NotFilled(TorchFunctionMode):
    """Skips the initialization of tensors on meta.

    There, torch.nn.init runs in Python, and takes longer than all the rest of building a model.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Implements torch's hook: returns a tensor on meta unchanged from any function of torch.nn.init."""
        if getattr(func, "__module__", None) in _INITIALIZERS:
            tensor: Tensor = args[0] if args else (kwargs or {})["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **(kwargs or {}))
