"""Triton kernels launched again without working out again what was compiled.

Triton's own launch binds the arguments, inspects each and looks the kernel up by the description of them all, some
20 us of processor time. Here a kernel is looked up by the few facts that its compilation depends on.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

# Triton compiles for an address or a number by whether this divides it.
_ALIGNMENT = 16


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
        facts = [device, constants, *options.values()]
        for argument in arguments:
            if isinstance(argument, Tensor):
                facts += (argument.dtype, argument.data_ptr() % _ALIGNMENT == 0)
            elif isinstance(argument, int):
                facts += (argument == 1, argument % _ALIGNMENT == 0, argument.bit_length() < 32)
        key = tuple(facts)
        compiled = self._compiled.get(key)
        if compiled is not None and device == torch._C._cuda_getDevice():
            stream = torch._C._cuda_getCurrentRawStream(device)
            compiled[grid](*arguments, *constants, stream=stream)
            return
        # Triton launches on the current device. Its interpreter takes tensors of the CPU, which have no number.
        with nullcontext() if device < 0 else torch.cuda.device(device):
            self._compiled[key] = self._kernel[grid](*arguments, *constants, **self._options, **options)
