"""Whether an op has to go through torch's dispatcher, or may be called as the function it is.

The dispatcher and the Python around a registered op cost the processor more than many of our kernels take, and are
for those who watch: compilers and tracers, fake tensors, dispatch modes (selective checkpointing is one), vmap.
"""

import importlib
import importlib.util

import torch
from torch import Tensor, nn


def is_eager(tensor: Tensor) -> bool:
    """Whether nothing records or replaces what is done with this tensor now, autograd aside."""
    return (
        not torch.compiler.is_compiling()
        # By class: a fake tensor says that it is an instance of Parameter.
        and (type(tensor) is Tensor or issubclass(type(tensor), nn.Parameter))
        and (tensor.is_cuda or tensor.is_cpu)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done with one of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


# torch's CUDA builds bring Triton; its CPU builds have none, and no use for it.
HAS_TRITON = importlib.util.find_spec("triton") is not None
