"""Triton kernels launched again without working out again what was compiled.

Triton's own launch binds the arguments, inspects each and looks the kernel up by the description of them all, some
20 us of processor time. Here a kernel is looked up by the few facts that its compilation depends on.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Triton compiles for an address or a number by whether this divides it.
_ALIGNMENT = 16
_SAME_DEVICE = nullcontext()


class Launcher:
    """One Triton kernel: tensors and numbers first among its parameters, then the constants it is compiled for."""

    def __init__(self, kernel: Any, **options: Any) -> None:
        """`options` are those of every launch, such as `enable_fp_fusion`."""
        self._kernel = kernel
        self._options = options
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        arguments: tuple[Tensor | int | float, ...],
        constants: tuple[Any, ...],
        **options: Any,
    ) -> None:
        """Launch on the current stream of the first argument's device; constants in the kernel's order."""
        first = arguments[0]
        assert isinstance(first, Tensor)
        device = first.get_device()
        key = (device, constants, *options.values(), *map(_kind, arguments))
        compiled = self._compiled.get(key)
        with _on(device):
            if compiled is None:
                self._compiled[key] = self._kernel[grid](*arguments, *constants, **self._options, **options)
            else:
                compiled[grid](*arguments, *constants)


def _kind(argument: Tensor | int | float) -> tuple[Any, ...]:
    """What Triton compiles for in one argument."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % _ALIGNMENT == 0
    if isinstance(argument, int):
        return argument == 1, argument % _ALIGNMENT == 0, argument.bit_length() < 32
    return ()


def _on(device: int) -> AbstractContextManager[Any]:
    """Within, `device` is the current one; asking which that is costs less than setting it."""
    # Triton's interpreter takes tensors of the CPU, which have no number.
    return _SAME_DEVICE if device < 0 or torch.cuda.current_device() == device else torch.cuda.device(device)
