"""Launches Triton kernels with little CPU time by caching the compiled kernel.

Triton's own launch binds the arguments, inspects each of them and builds a key from all of that: about 20 us
of CPU time. `Launcher` builds a smaller key from the few properties that Triton specializes a compilation on.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

# Triton specializes on whether a pointer or an integer is divisible by this.
_ALIGNMENT = 16


class Launcher:
    """Launches one Triton kernel. Its parameters are tensors and numbers, followed by constants."""

    def __init__(self, kernel: Any, **options: Any) -> None:
        """Takes the options that apply to every launch, such as `enable_fp_fusion`."""
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
        """Launches on the current stream of the first argument's device.

        `arguments` and `constants` are in the order of the kernel's
        parameters. The first argument is a tensor.
        """
        first = arguments[0]
        assert isinstance(first, Tensor)
        device = first.get_device()
        # All that a compilation depends on: dtype and alignment of tensors; for an integer, whether it is 1,
        # divisible by 16, and fits 32 bits; every constant and option.
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
        # First launch with this key, or another current device: Triton compiles and launches on the current
        # device. Triton's interpreter takes CPU tensors, whose device index is -1.
        with nullcontext() if device < 0 else torch.cuda.device(device):
            self._compiled[key] = self._kernel[grid](*arguments, *constants, **self._options, **options)
