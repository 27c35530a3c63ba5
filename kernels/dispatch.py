"""Decides when an op can skip torch's dispatcher and call its kernel directly.

Going through the dispatcher and the Python around a registered op takes more CPU time than many of our
kernels take on the GPU. Only observers need the dispatcher: compilers and tracers, fake tensors, dispatch
modes (selective checkpointing, for example) and vmap.
"""

import importlib
import importlib.util

import torch
from torch import Tensor, nn


def is_eager(tensor: Tensor) -> bool:
    """Returns True if nothing except autograd records or replaces operations on this tensor."""
    return (
        not torch.compiler.is_compiling()
        # Compare the class itself: isinstance(fake_tensor, Parameter) can be True.
        and (type(tensor) is Tensor or issubclass(type(tensor), nn.Parameter))
        and (tensor.is_cuda or tensor.is_cpu)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Returns True if autograd records operations on at least one of these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


# CUDA builds of torch include Triton. CPU builds do not and do not need it.
HAS_TRITON = importlib.util.find_spec("triton") is not None
