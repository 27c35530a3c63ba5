"""Checks the CUDA kernels of the blocks' elementwise ops against their reference, with poisoned memory."""

import pytest
import torch

from halfbyte.kernels.copy_rows import ops as copy_ops
from halfbyte.kernels.gelu import ops as gelu_ops
from halfbyte.kernels.gelu import reference as gelu_reference
from halfbyte.kernels.modulation import ops as modulation_ops
from halfbyte.kernels.modulation import reference
from halfbyte.kernels.qk_rope import ops as qk_rope_ops
from halfbyte.kernels.qk_rope import reference as qk_rope_reference
from halfbyte.kernels.qk_rope.ops import Stream
from halfbyte.trainer.plan.op_costs import costs_of

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu

# The largest allowed error relative to a result's norm: with another order of
# additions some values round differently.
LARGEST_ERROR = {torch.bfloat16: 2e-4, torch.float16: 3e-5, torch.float32: 1e-6}
EPS = 1e-6


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills memory with NaN and frees it. Outputs reuse this memory, so unwritten values show as NaN."""
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24):
        torch.full((size,), float("nan"), device="cuda")


def assert_close(actual, expected):
    actual, expected = (list(x) if isinstance(x, tuple | list) else [x] for x in (actual, expected))
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        norm = theirs.double().norm().clamp_min(1e-30).item()
        error = (ours.double() - theirs.double()).norm().item() / norm
        # If there are few values, a single one that rounds differently is a larger share.
        neighbor = torch.finfo(theirs.dtype).eps * theirs.abs().max().item() / norm if theirs.numel() else 0.0
        limit = max(LARGEST_ERROR[theirs.dtype], neighbor)
        assert error <= limit, (
            f"result {number}: got relative error {error:.1e}, expected at most {limit:.1e}"
        )


def slices(count, shape, dtype):
    """Returns random streams that are slices of wider and longer buffers."""
    batch, rows, width = shape
    return [
        torch.randn(batch, rows + 3, width + 24, device="cuda", dtype=dtype)[:, 3:, 16 : width + 16]
        for _ in range(count)
    ]


# FLUX at 1024 px; FLUX, SD3.5 large, SD3 medium and a miniature with few rows; an odd width; a single row.
@pytest.mark.parametrize(
    ("width", "dtype", "batch", "rows"),
    [
        (3072, torch.bfloat16, 1, 4608),
        (3072, torch.bfloat16, 2, 37),
        (2432, torch.bfloat16, 2, 37),
        (1536, torch.float16, 2, 37),
        (192, torch.float32, 2, 37),
        (51, torch.bfloat16, 2, 37),
        (192, torch.bfloat16, 3, 1),
    ],
)
def test_modulation_equals_the_reference(width, dtype, batch, rows):
    x, update, dy, residual = slices(4, (batch, rows, width), dtype)
    x = x + 3  # a mean that must not leak into the variance
    scale, shift, gate = torch.randn(batch, 3 * width, device="cuda", dtype=dtype).chunk(3, dim=1)
    for name, arguments in {
        "layer_norm_modulate": (x, scale, shift, EPS),
        "layer_norm_modulate_backward": (dy, x, scale, residual, EPS),
        "layer_norm_modulate_grads": (dy, x, scale, residual, EPS),
        "gated_residual": (x, gate, update, True),
        "gated_residual_backward": (dy, gate),
        "gated_residual_grads": (dy, gate, update),
    }.items():
        actual = getattr(torch.ops.halfbyte, name).default(*arguments)
        assert_close(actual, getattr(reference, name)(*arguments))
    assert_close(
        modulation_ops.layer_norm_modulate_backward(dy, x, scale),
        reference.layer_norm_modulate_backward(dy, x, scale, None, EPS),
    )


def test_results_are_written_into_out():
    x, update, dy = slices(3, (2, 37, 3072), torch.bfloat16)
    scale, shift, gate = torch.randn(2, 3 * 3072, device="cuda", dtype=torch.bfloat16).chunk(3, dim=1)
    for function, arguments in (
        (modulation_ops.layer_norm_modulate, (x, scale, shift)),
        (modulation_ops.gated_residual, (x, gate, update)),
        (modulation_ops.gated_residual_backward, (dy, gate)),
        (modulation_ops.gated_residual_grads, (dy, gate, update)),
    ):
        buffer = torch.full((2, 37, 3072 + 48), float("nan"), device="cuda", dtype=torch.bfloat16)
        actual = function(*arguments, out=buffer[..., :3072])
        torch.testing.assert_close(actual, function(*arguments), rtol=0, atol=0)
        written = actual if isinstance(actual, torch.Tensor) else actual[0]
        assert written.data_ptr() == buffer.data_ptr()
        assert buffer[..., 3072:].isnan().all()


def test_dtypes_may_differ():
    x, residual = slices(2, (2, 5, 192), torch.float32)
    update, dy = slices(2, (2, 5, 192), torch.bfloat16)
    scale, shift, gate = torch.randn(2, 3 * 192, device="cuda").chunk(3, dim=1)
    arguments = (x, gate.bfloat16(), update, False)
    assert_close(torch.ops.halfbyte.gated_residual.default(*arguments), reference.gated_residual(*arguments))
    arguments = (x, scale, shift.bfloat16(), EPS)
    actual = torch.ops.halfbyte.layer_norm_modulate.default(*arguments)
    assert_close(actual, reference.layer_norm_modulate(*arguments))
    arguments = (dy, x, scale.half(), residual, EPS)
    actual = torch.ops.halfbyte.layer_norm_modulate_grads.default(*arguments)
    assert_close(actual, reference.layer_norm_modulate_grads(*arguments))


def test_sums_are_bitwise_repeatable():
    x, update, dy = slices(3, (1, 4608, 3072), torch.bfloat16)
    scale = torch.randn(1, 3072, device="cuda", dtype=torch.bfloat16)
    first = modulation_ops.layer_norm_modulate_grads(dy, x, scale)
    first += modulation_ops.gated_residual_grads(dy, scale, update)
    for _ in range(3):
        again = modulation_ops.layer_norm_modulate_grads(dy, x, scale)
        again += modulation_ops.gated_residual_grads(dy, scale, update)
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_fp16_is_clipped_on_request():
    x = torch.tensor([[[6e4, -6e4, 1.0, float("nan")]]], device="cuda", dtype=torch.float16)
    gate = torch.ones(1, 4, device="cuda", dtype=torch.float16)
    clipped = modulation_ops.gated_residual(x, gate, x, clip=True)
    assert clipped.view(-1)[:3].tolist() == [65504.0, -65504.0, 2.0]
    assert clipped.view(-1)[3].isnan()
    plain = modulation_ops.gated_residual(x, gate, x)
    assert plain.view(-1)[:3].tolist() == [float("inf"), float("-inf"), 2.0]


@pytest.mark.parametrize(
    ("width", "dtype"), [(12288, torch.bfloat16), (9728, torch.float16), (100, torch.float32)]
)
def test_gelu_equals_the_reference(width, dtype):
    x, dy = slices(2, (2, 37, width), dtype)
    x = x * 4
    buffer = torch.full((2, 37, width + 48), float("nan"), device="cuda", dtype=dtype)
    gelu_ops.gelu_tanh(x, buffer[..., 48:])
    assert_close(buffer[..., 48:], gelu_reference.gelu_tanh(x))
    assert buffer[..., :48].isnan().all()
    expected = gelu_reference.gelu_tanh_backward(dy, x)
    assert_close(gelu_ops.gelu_tanh_backward(dy, x), expected)
    gelu_ops.gelu_tanh_backward(dy, x, dy)
    assert_close(dy, expected)


# FLUX's MLP at 1024 px; the ranks of several adapters; a rank too large for the fused kernel; an adapter on
# one side only; odd sizes.
@pytest.mark.parametrize(
    ("rows", "width", "p", "u", "dtype"),
    [
        (4608, 12288, 16, 16, torch.bfloat16),
        (1024, 9728, 40, 32, torch.bfloat16),
        (300, 512, 64, 64, torch.float16),
        (300, 512, 72, 16, torch.bfloat16),
        (37, 100, 8, 0, torch.float32),
        (37, 100, 0, 5, torch.float32),
        (1, 64, 16, 7, torch.bfloat16),
    ],
)
def test_gelu_gradients_with_adapters_equal_the_reference(rows, width, p, u, dtype):
    x, dy = (part[0] for part in slices(2, (1, rows, width), dtype))
    x = x * 4
    gb = torch.randn(rows, p + 8, device="cuda", dtype=dtype)[:, 8:]
    xa = torch.randn(rows, u + 3, device="cuda", dtype=dtype)[:, 3:]
    buffer = torch.full((rows, width + 48), float("nan"), device="cuda", dtype=dtype)
    down, up = gelu_ops.gelu_tanh_gradients(dy, x, gb, xa, buffer[:, 48:])
    dx, *expected = gelu_reference.gelu_tanh_gradients(dy, x, gb, xa)
    assert_close(buffer[:, 48:], dx)
    assert buffer[:, :48].isnan().all()
    again = gelu_ops.gelu_tanh_gradients(dy, x, gb, xa, buffer[:, 48:])
    for ours, theirs, repeated in zip((down, up), expected, again, strict=True):
        assert ours.dtype == torch.float32
        assert ours.shape == theirs.shape
        assert ours.is_contiguous()
        assert torch.equal(ours, repeated)
        # The factors are rounded before the product. One that rounds differently
        # affects a sum by more than an ulp.
        error = (ours - theirs).norm().item() / max(theirs.norm().item(), 1e-30)
        assert error < {torch.bfloat16: 3e-4, torch.float16: 1e-4, torch.float32: 4e-6}[dtype], error


@pytest.mark.parametrize("rows", [100, 4096])
def test_gelu_gradients_allocate_what_the_plan_predicts(rows):
    width, p, u = 3072, 16, 32
    x, dy = (torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gb, xa = (torch.randn(rows, size, device="cuda", dtype=torch.bfloat16) for size in (p, u))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sums = gelu_ops.gelu_tanh_gradients(dy, x, gb, xa, dy)
    taken = torch.cuda.max_memory_allocated() - before - sum(part.nbytes for part in sums)
    assert taken == costs_of(torch.ops.halfbyte.gelu_tanh_gradients_.default).inside(
        (dy, dy, x, gb, xa), sums
    )


@pytest.mark.parametrize(
    ("width", "dtype"), [(3072, torch.bfloat16), (1000, torch.float32), (7, torch.uint8)]
)
def test_rows_are_copied_with_any_strides(width, dtype):
    source = torch.randint(0, 100, (2, 40, width + 24), device="cuda").to(dtype)
    x = source[:, 3:, 16 : width + 16]
    buffer = torch.full((2, 37, width + 48), 101, device="cuda", dtype=dtype)
    copy_ops.copy_rows(x, buffer[..., 48:])
    assert torch.equal(buffer[..., 48:], x)
    assert bool((buffer[..., :48] == 101).all())
    assert torch.equal(copy_ops.copy_rows(x), x)
    assert torch.equal(copy_ops.copy_rows(x.mT), x.mT)


@pytest.mark.parametrize(
    ("heads", "head_dim", "lengths", "dtype", "normed", "rotated"),
    [
        (24, 128, (512, 4096), torch.bfloat16, True, True),
        (24, 128, (37,), torch.float16, True, True),
        (38, 64, (33, 4), torch.float32, True, False),
        (24, 64, (7, 1), torch.bfloat16, False, False),
        (24, 64, (7, 1), torch.bfloat16, False, True),
        (2, 32, (3, 5), torch.float32, True, True),
        (3, 24, (3, 5), torch.bfloat16, True, True),
    ],
)
def test_joint_buffers_equal_the_reference(heads, head_dim, lengths, dtype, normed, rotated):
    batch, width, length = 2, heads * head_dim, sum(lengths)
    weights = (torch.rand(2, head_dim, device="cuda", dtype=dtype) + 0.5) if normed else (None, None)
    wide = [torch.randn(batch, rows, 3 * width + 8, device="cuda", dtype=dtype) for rows in lengths]
    # Query and key are slices of one buffer, value is a separate tensor.
    streams = [
        Stream(*part[..., : 2 * width].chunk(2, -1), part[..., -width:].clone(), *weights) for part in wide
    ]
    rope = tuple(torch.randn(2, length, head_dim, device="cuda")) if rotated else None
    cos, sin = rope or (None, None)
    norms = [[w] * len(lengths) if normed else [] for w in weights]
    query, key, value = qk_rope_ops.qk_norm_rope(streams, rope, heads=heads)
    queries, keys = [s.query for s in streams], [s.key for s in streams]
    assert_close(query, qk_rope_reference.norm_rope(queries, norms[0], cos, sin, heads, EPS))
    assert_close(key, qk_rope_reference.norm_rope(keys, norms[1], cos, sin, heads, EPS))
    assert torch.equal(value, torch.cat([s.value for s in streams], dim=1).unflatten(-1, (heads, -1)))
    # The strides that the backwards of flash and cuDNN produce.
    dq = torch.randn(batch, heads, length, head_dim, device="cuda", dtype=dtype).transpose(1, 2)
    dk, dv = torch.randn(2, batch, length, heads, head_dim, device="cuda", dtype=dtype)
    grads = qk_rope_ops.qk_norm_rope_backward(dq, dk, dv, streams, rope)
    expected = zip(
        qk_rope_reference.norm_rope_backward(dq, queries, norms[0], cos, sin, EPS),
        qk_rope_reference.norm_rope_backward(dk, keys, norms[1], cos, sin, EPS),
        [part.flatten(2) for part in dv.split(list(lengths), dim=1)],
        strict=True,
    )
    for actual, grads_of_stream in zip(grads, expected, strict=True):
        assert_close(actual, grads_of_stream)
    buffers = [
        torch.full((batch, n, 3 * width + 8), float("nan"), device="cuda", dtype=dtype) for n in lengths
    ]
    out = [buffer[..., 8:].chunk(3, dim=-1) for buffer in buffers]
    qk_rope_ops.qk_norm_rope_backward(dq, dk, dv, streams, rope, out=out)
    for actual, grads_of_stream, buffer in zip(out, grads, buffers, strict=True):
        assert all(torch.equal(*pair) for pair in zip(actual, grads_of_stream, strict=True))
        assert buffer[..., :8].isnan().all()


def test_the_ops_run_in_a_compiled_graph():
    x, update = slices(2, (2, 5, 192), torch.bfloat16)
    scale, shift, gate = torch.randn(2, 3 * 192, device="cuda", dtype=torch.bfloat16).chunk(3, dim=1)

    def block(x, update):
        wide = torch.empty(2, 5, 384, device="cuda", dtype=torch.bfloat16)
        y = modulation_ops.gated_residual(x, gate, update)
        normed = modulation_ops.layer_norm_modulate(y, scale, shift, out=wide[..., :192])
        gelu_ops.gelu_tanh(normed, wide[..., 192:])
        query, _, _ = qk_rope_ops.qk_norm_rope([Stream(normed, y, x)], None, heads=3)
        return wide, query

    actual = torch.compile(block, fullgraph=True, backend="aot_eager")(x, update)
    torch.testing.assert_close(actual, block(x, update), rtol=0, atol=0)


def test_too_wide_rows_are_refused():
    x = torch.zeros(1, 1, 40000, device="cuda")
    with pytest.raises(ValueError, match="x: got rows of 40000"):
        modulation_ops.layer_norm_modulate(x, x[0], x[0])
