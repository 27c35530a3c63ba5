"""Attention without a mask, with a backend chosen by name and access to its softmax statistics.

A block that recomputes its activations needs forward and backward as separate calls.
Between the two passes it keeps only the output and the softmax statistics (one number per
row and head). It recomputes queries, keys and values.

cuDNN is nearly twice as fast as flash on Hopper. Its backward assumes that the incoming gradient has the same
memory layout as the output. If it does not, the gradients are silently wrong or the process crashes (torch
2.11, cuDNN 9.19). The backward here therefore makes the gradient contiguous first.

flash4 is FlashAttention-4, from an optional package. On Hopper it takes 0.88 of cuDNN's time at FLUX's 24
heads of 128, and 0.80 at SD3.5 large's 38 heads of 64 (4608 tokens, docs/benchmarks/train.md).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["cudnn", "flash", "flash4", "efficient", "deterministic", "cpu"]
BACKENDS: tuple[Backend, ...] = ("cudnn", "flash", "flash4", "efficient", "deterministic", "cpu")
"""`deterministic` is flash (or efficient, for dtypes flash lacks) with a bitwise repeatable backward."""

_library = torch.library.Library("halfbyte", "FRAGMENT")
_library.define("attention(Tensor query, Tensor key, Tensor value, str backend) -> (Tensor, Tensor)")
_library.define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp,"
    " str backend) -> (Tensor, Tensor, Tensor)"
)


FLASH4_PACKAGE = "flash-attn-4"
FLASH4_INSTALL = "pip install 'flash-attn-4[cu13]>=4.0.0b36'"


def flash4_version() -> str | None:
    """Returns the installed version of the package that provides flash4, or None if it is not installed."""
    try:
        return version(FLASH4_PACKAGE)
    except PackageNotFoundError:
        return None


@cache
def _flash4() -> Any:
    """Returns FlashAttention-4's module. Importing takes seconds, so it happens on first use."""
    # The package warns about its own arguments whenever it compiles a kernel.
    warnings.filterwarnings("ignore", message="Argument aux_data")
    from flash_attn.cute import interface

    return interface


def default_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """Returns a backend that needs no probe: cpu, flash (16-bit CUDA) or efficient (other dtypes)."""
    if device.type == "cpu":
        return "cpu"
    return "flash" if dtype in (torch.float16, torch.bfloat16) else "efficient"


def trainable_backend(query: Tensor) -> Backend | None:
    """Returns the backend to train with when none was chosen, or None if torch may choose.

    On a GPU torch itself may choose cuDNN, without ensuring the gradient layout that cuDNN's backward needs.
    """
    if query.is_cuda and torch.is_grad_enabled():
        return default_backend(query.device, query.dtype)
    return None


@contextmanager
def _fixed_summation_order() -> Iterator[None]:
    """Makes torch's attention backward add in a fixed order, by setting and restoring a process-wide flag."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    # The kernels write every element of their outputs, so filling those first would only cost time.
    memory.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        memory.fill_uninitialized_memory = fills


def _torch_kernel(query: Tensor, backend: str) -> str:
    """Returns the torch kernel to run: `deterministic` stands for flash or efficient, by dtype."""
    return default_backend(query.device, query.dtype) if backend == "deterministic" else backend


def _forward(query: Tensor, key: Tensor, value: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "flash4":
        out, statistics, *_ = _flash4()._flash_attn_fwd(query, key, value, return_lse=True)
        return out, statistics
    parts = [part.transpose(1, 2) for part in (query, key, value)]
    aten = torch.ops.aten
    backend = _torch_kernel(query, backend)
    if backend == "cudnn":
        result = aten._scaled_dot_product_cudnn_attention(*parts, None, True)
    elif backend == "flash":
        result = aten._scaled_dot_product_flash_attention(*parts)
    elif backend == "efficient":
        result = aten._scaled_dot_product_efficient_attention(*parts, None, True)
    elif backend == "cpu":
        result = aten._scaled_dot_product_flash_attention_for_cpu(*parts)
    else:
        raise ValueError(f"attention: got backend '{backend}', expected one of {', '.join(BACKENDS)}")
    return result[0].transpose(1, 2).contiguous(), result[1]


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    # The output is contiguous as (B, S, H, D), so the gradient must be too (see the module's docstring).
    if backend == "flash4":
        query_grad, key_grad, value_grad, *_ = _flash4()._flash_attn_bwd(
            query, key, value, out, grad.contiguous(), logsumexp
        )
        return query_grad, key_grad, value_grad
    parts = [part.transpose(1, 2) for part in (grad.contiguous(), query, key, value, out)]
    tokens, keys = query.shape[1], key.shape[1]
    if backend == "deterministic":
        with _fixed_summation_order():
            kernel = _torch_kernel(query, backend)
            return _backward(grad, query, key, value, out, logsumexp, kernel)
    aten = torch.ops.aten
    # torch's kernels require a dropout RNG state. With dropout 0 they never read it.
    state = torch.zeros((), dtype=torch.int64, device=grad.device)
    if backend == "cudnn":
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            *parts, logsumexp, state, state, None, None, None, tokens, keys, 0.0, False
        )
    elif backend == "flash":
        grads = aten._scaled_dot_product_flash_attention_backward(
            *parts, logsumexp, None, None, tokens, keys, 0.0, False, state, state
        )
    elif backend == "efficient":
        grads = aten._scaled_dot_product_efficient_attention_backward(
            *parts[:4], None, parts[4], logsumexp, state, state, 0.0, [True, True, True, False]
        )
    else:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*parts, logsumexp, 0.0, False)
    query_grad, key_grad, value_grad = (part.transpose(1, 2) for part in grads[:3])
    return query_grad.contiguous(), key_grad.contiguous(), value_grad.contiguous()


_library.impl("attention", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("halfbyte::attention", lib=_library)
def _fake_forward(query: Tensor, key: Tensor, value: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = query.shape
    backend = _torch_kernel(query, backend)
    if backend == "cpu":
        # torch's CPU kernel returns the statistics with these strides and this dtype.
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        statistics = query.new_empty((batch, tokens, heads), dtype=dtype).transpose(1, 2)
    elif backend == "cudnn":
        statistics = query.new_empty((batch, heads, tokens, 1), dtype=torch.float32)
    elif backend == "efficient":
        # torch pads the rows to a multiple of 32.
        statistics = query.new_empty((batch, heads, -(-tokens // 32) * 32), dtype=torch.float32)
    else:
        statistics = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    return torch.empty_like(query, memory_format=torch.contiguous_format), statistics


@torch.library.register_fake("halfbyte::attention_backward", lib=_library)
def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    query_grad, key_grad, value_grad = (
        torch.empty_like(part, memory_format=torch.contiguous_format) for part in (query, key, value)
    )
    return query_grad, key_grad, value_grad


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: tuple[Tensor, Tensor]) -> None:
    *parts, ctx.backend = inputs
    ctx.save_for_backward(*parts, *output)


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, out, logsumexp = ctx.saved_tensors
    return (*attention_backward(grad, query, key, value, out, logsumexp, ctx.backend), None)


torch.library.register_autograd("halfbyte::attention", _gradients, setup_context=_save, lib=_library)


def attention(query: Tensor, key: Tensor, value: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Returns softmax(q k^T / sqrt(D)) v of each head, and the logarithms of the softmax denominators.

    query, key and value are (B, S, H, D) of one dtype with a contiguous last dimension. The output has the
    same shape and is contiguous. The layout of the statistics depends on the backend; pass them only to
    `attention_backward`. Differentiable through the output.

    Raises:
        ValueError: for an unknown backend.
    """
    result: tuple[Tensor, Tensor] = torch.ops.halfbyte.attention.default(query, key, value, backend)
    return result


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the contiguous gradients of query, key and value.

    `grad` is the output's gradient, in any layout.
    `out` and `logsumexp` are the results of `attention` with the same backend.
    """
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.halfbyte.attention_backward.default(
        grad, query, key, value, out, logsumexp, backend
    )
    return result
