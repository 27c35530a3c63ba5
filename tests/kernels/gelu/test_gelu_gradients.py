"""Checks GELU's backward fused with the neighboring adapters' gradients, and the copy of rows."""

import pytest
import torch
from torch.nn import functional

from halfbyte.kernels.copy_rows import ops as copy_ops
from halfbyte.kernels.gelu import ops as gelu_ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("p", "u"), [(6, 9), (0, 9), (6, 0), (70, 3)])
def test_gelu_backward_returns_the_neighboring_adapters_gradients(dtype, p, u):
    # a = gelu(x + B1 (A1 h)); z = ... + B2 (A2 a). Autograd in float64 gives the gradients of x, A2 (down)
    # and B1 (up).
    rows, width = 11, 48
    xa, gb = torch.randn(rows, u).to(dtype), torch.randn(rows, p).to(dtype)
    x, dy = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    up = torch.zeros(width, u, dtype=torch.float64, requires_grad=True)
    down = torch.zeros(p, width, dtype=torch.float64, requires_grad=True)
    hidden = x.double().requires_grad_()
    acted = functional.gelu(hidden + xa.double() @ up.t(), approximate="tanh")
    loss = (acted * dy.double()).sum() + ((acted @ down.t()) * gb.double()).sum()
    expected = torch.autograd.grad(loss, (hidden, down, up))
    buffer = torch.full((rows, width + 16), float("nan"), dtype=dtype)
    found = gelu_ops.gelu_tanh_gradients(dy, x, gb, xa, buffer[:, 16:])
    assert buffer[:, :16].isnan().all()
    for ours, exact in zip((buffer[:, 16:], *found), expected, strict=True):
        assert ours.shape == exact.shape
        limit = {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
        assert (ours.double() - exact).norm() <= limit * exact.norm()
    assert all(part.dtype == torch.float32 for part in found)


def test_rows_are_copied_only_into_their_slice():
    x = torch.randn(2, 5, 64)[..., 8:40]
    buffer = torch.full((2, 5, 50), float("nan"))
    assert copy_ops.copy_rows(x, buffer[..., 10:42]).data_ptr() == buffer[..., 10:].data_ptr()
    assert torch.equal(buffer[..., 10:42], x)
    assert bool(buffer[..., :10].isnan().all() and buffer[..., 42:].isnan().all())
    copied = copy_ops.copy_rows(x)
    assert copied.is_contiguous()
    assert torch.equal(copied, x)
