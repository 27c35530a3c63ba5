"""Checks the attention op against float64, its layouts and determinism, and its registration with torch."""

import pytest
import torch

from halfbyte.kernels.attention.ops import attention, attention_backward, default_backend, flash4_version

GPU = pytest.mark.gpu
NEEDS_FLASH4 = pytest.mark.skipif(flash4_version() is None, reason="needs flash-attn-4")
ON = [("cpu", "cpu"), ("cpu", "deterministic")] + [
    pytest.param("cuda", name, marks=GPU) for name in ("cudnn", "flash", "efficient", "deterministic")
]
ON.append(pytest.param("cuda", "flash4", marks=[GPU, NEEDS_FLASH4]))


def random_parts(batch, tokens, heads, dim, *, device, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, heads, dim)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]


def exact(query, key, value, grad):
    """Returns the output and the gradients in float64, computed by the definition."""
    parts = [part.detach().double().requires_grad_() for part in (query, key, value)]
    q, k, v = (part.transpose(1, 2) for part in parts)
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    out = (weights @ v).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, parts, grad.double())]


def error(value, expected):
    return float((value.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(1, 96, 2, 64), (2, 77, 3, 32), (1, 300, 4, 128)])
@pytest.mark.parametrize(("device", "backend"), ON)
def test_output_and_gradients_equal_float64(device, backend, shape):
    parts = random_parts(*shape, device=device, dtype=torch.bfloat16)
    # Like the blocks' gradient: a slice of a wider buffer, with another memory order than the output.
    grad = torch.randn(shape[0], shape[2], shape[1], 2 * shape[3], dtype=torch.bfloat16).to(device)
    grad = grad.transpose(1, 2)[..., : shape[3]]
    out, _ = attention(*parts, backend)
    assert out.is_contiguous()
    grads = torch.autograd.grad(out, parts, grad)
    for value, expected in zip([out, *grads], exact(*parts, grad), strict=True):
        assert error(value, expected) < 1e-2


@pytest.mark.parametrize(("device", "backend"), ON)
def test_the_backward_needs_only_output_and_statistics(device, backend):
    parts = random_parts(1, 64, 2, 64, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        out, statistics = attention(*parts, backend)
    grad = torch.ones_like(out)
    again = [part.detach().clone() for part in parts]
    expected = torch.autograd.grad(attention(*parts, backend)[0], parts, grad)
    for value, wanted in zip(
        attention_backward(grad, *again, out, statistics, backend), expected, strict=True
    ):
        # Flash adds dQ in no fixed order.
        torch.testing.assert_close(value, wanted, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize(("device", "backend"), ON)
def test_the_op_passes_opcheck(device, backend):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    parts = random_parts(1, 48, 2, 32, device=device, dtype=dtype)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.halfbyte.attention.default, (*parts, backend), test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_the_deterministic_backward_is_bitwise_repeatable(device, dtype):
    tokens = 400 if device == "cpu" else 2000
    parts = random_parts(1, tokens, 4, 64, device=device, dtype=dtype)
    grad = torch.randn(1, tokens, 4, 64, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    first, *others = (
        torch.autograd.grad(attention(*parts, "deterministic")[0], parts, grad) for _ in range(5)
    )
    assert all(torch.equal(*pair) for other in others for pair in zip(first, other, strict=True))


def test_torch_flags_are_restored(monkeypatch):
    parts = random_parts(1, 8, 1, 8, device="cpu", dtype=torch.float32)
    seen = []
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    monkeypatch.setattr(
        torch.ops.aten,
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        lambda *args: seen.append(torch.are_deterministic_algorithms_enabled()) or kernel(*args),
    )
    torch.use_deterministic_algorithms(False)
    torch.autograd.grad(attention(*parts, "deterministic")[0].sum(), parts)
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_an_unknown_backend_is_refused():
    parts = random_parts(1, 4, 1, 8, device="cpu", dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"attention: .*'fast', .*cudnn, flash, flash4, efficient, deterministic, cpu"
    ):
        attention(*parts, "fast")


def test_default_backends():
    assert default_backend(torch.device("cpu"), torch.bfloat16) == "cpu"
    assert default_backend(torch.device("cuda"), torch.bfloat16) == "flash"
    assert default_backend(torch.device("cuda"), torch.float32) == "efficient"
