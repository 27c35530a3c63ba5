"""Checks the blocks' elementwise ops on CPU against float64, autograd and diffusers' modules."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle, SD35AdaLayerNormZeroX
from diffusers.models.transformers import transformer_flux
from torch.nn import functional

from halfbyte.kernels.copy_rows import ops as copy_ops
from halfbyte.kernels.gelu import ops as gelu_ops
from halfbyte.kernels.gelu import reference as gelu_reference
from halfbyte.kernels.modulation import ops as modulation_ops
from halfbyte.kernels.modulation import reference
from halfbyte.kernels.qk_rope import ops as qk_rope_ops
from halfbyte.kernels.qk_rope import reference as qk_rope_reference
from halfbyte.kernels.qk_rope.ops import Stream
from tests.support import elementwise_autograd as differentiable

EPS = 1e-6
# The largest relative error of one rounding: half the distance between neighboring numbers.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPE = (2, 5, 48)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


def modulation(count, dtype=torch.float32, shape=SHAPE):
    """Returns chunks of one wider row, like the modulation layers do."""
    return torch.randn(shape[0], count * shape[2], dtype=dtype).chunk(count, dim=1)


def raises(match):
    return pytest.raises(ValueError, match=match)


def grads(outputs, inputs, upstream):
    return torch.autograd.grad(outputs, inputs, upstream)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_one_rounding_away_from_float64(dtype):
    x, update, dy, residual = (randn(*SHAPE, dtype=dtype) for _ in range(4))
    scale, shift, gate = modulation(3, dtype)
    for function, arguments in (
        (reference.layer_norm_modulate, (x + 3, scale, shift, EPS)),
        (reference.layer_norm_modulate_backward, (dy, x, scale, residual, EPS)),
        (reference.gated_residual, (x, gate, update, False)),
        (reference.gated_residual_backward, (dy, gate)),
        (gelu_reference.gelu_tanh, (x,)),
        (gelu_reference.gelu_tanh_backward, (dy, x)),
    ):
        exact = function(*(a.double() if isinstance(a, torch.Tensor) else a for a in arguments))
        out = function(*arguments)
        assert out.dtype == dtype
        # Next to a 16-bit rounding, fp32 arithmetic counts as exact. Where terms
        # cancel, it is off by a few ulps.
        torch.testing.assert_close(out.double(), exact, rtol=ROUNDING[dtype] * 1.01, atol=1e-5)


def test_backwards_equal_autograd():
    """Compares in float64, where only the formula can differ."""
    x, update, dy, residual = (randn(*SHAPE, dtype=torch.float64).requires_grad_() for _ in range(4))
    scale, shift, gate = (m.clone().requires_grad_() for m in modulation(3, torch.float64))

    normed = reference.layer_norm_modulate(x, scale, shift, EPS)
    expected = grads((normed, x * 1), (x, scale, shift), (dy, residual))
    actual = reference.layer_norm_modulate_grads(dy, x, scale, residual, EPS)
    torch.testing.assert_close(actual, expected)

    expected = grads(reference.gated_residual(x, gate, update, False), (update, gate), dy)
    torch.testing.assert_close(reference.gated_residual_grads(dy, gate, update), expected)

    wide = x * 8
    expected = grads(functional.gelu(wide, approximate="tanh"), wide, dy)[0]
    torch.testing.assert_close(gelu_reference.gelu_tanh_backward(dy, wide), expected)


@pytest.mark.parametrize(("normed", "rotated"), [(True, True), (True, False), (False, True), (False, False)])
def test_joint_backward_equals_autograd(normed, rotated):
    heads, dim, lengths = 3, 8, (2, 3)
    projections = [randn(2, rows, heads * dim, dtype=torch.float64).requires_grad_() for rows in lengths]
    weights = [torch.rand(dim, dtype=torch.float64) for _ in lengths] if normed else []
    cos, sin = torch.randn(2, 5, dim, dtype=torch.float64) if rotated else (None, None)
    joint = qk_rope_reference.norm_rope(projections, weights, cos, sin, heads, EPS)
    grad = torch.randn_like(joint)
    expected = grads(joint, projections, grad)
    actual = qk_rope_reference.norm_rope_backward(grad, projections, weights, cos, sin, EPS)
    torch.testing.assert_close(actual, list(expected))


def test_gelu_equals_torch_and_keeps_small_values():
    x = torch.linspace(-30, 30, 601)
    torch.testing.assert_close(gelu_reference.gelu_tanh(x), functional.gelu(x, approximate="tanh"))
    # Here 1 + tanh(u) cancels to 0 in fp32, but not in float64; x sigmoid(2u) must keep the value.
    far = torch.tensor([-5.0, -5.5, -6.0])
    exact = functional.gelu(far.double(), approximate="tanh")
    torch.testing.assert_close(gelu_reference.gelu_tanh(far).double(), exact, rtol=2e-4, atol=0)


def test_adaptive_norms_equal_diffusers():
    x, emb = randn(*SHAPE).requires_grad_(), randn(2, 48).requires_grad_()
    dy = randn(*SHAPE)
    for module, places in (
        (AdaLayerNormZero(48), ((6, 1, 0),)),
        (AdaLayerNormZeroSingle(48), ((3, 1, 0),)),
        (SD35AdaLayerNormZeroX(48), ((9, 1, 0), (9, 7, 6))),
    ):
        outputs = module(x, emb=emb)
        theirs = tuple(outputs[i] for i in (0, 5)[: len(places)])
        ours = []
        for count, scale, shift in places:
            parts = module.linear(functional.silu(emb)).chunk(count, dim=1)
            ours.append(differentiable.layer_norm_modulate(x, parts[scale], parts[shift]))
        upstream = [dy] * len(places)
        expected = grads(theirs, (x, emb), upstream)
        torch.testing.assert_close(tuple(ours), theirs)
        torch.testing.assert_close(grads(ours, (x, emb), upstream), expected)


def flux_attention(added):
    attention = transformer_flux.FluxAttention(
        48,
        heads=3,
        dim_head=16,
        out_dim=48,
        eps=EPS,
        pre_only=not added,
        added_kv_proj_dim=48 if added else None,
    )
    for name, parameter in attention.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return attention


@pytest.mark.parametrize("added", [True, False])
def test_joint_buffers_equal_flux(monkeypatch, added):
    attention = flux_attention(added)
    text, image = randn(2, 3, 48).requires_grad_(), randn(2, 4, 48).requires_grad_()
    inputs = (text, image) if added else (image,)
    angles = torch.rand(sum(x.shape[1] for x in inputs), 8).repeat_interleave(2, dim=1)
    rope = (angles.cos(), angles.sin())
    seen = []

    def record(query, key, value, **_):
        seen.extend((query, key, value))
        return query

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", record)
    attention(image, text if added else None, image_rotary_emb=rope)
    layers = [(attention.to_q, attention.to_k, attention.to_v, attention.norm_q, attention.norm_k)]
    if added:
        added_layers = (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj)
        layers.insert(0, (*added_layers, attention.norm_added_q, attention.norm_added_k))
    streams = [
        Stream(q(x), k(x), v(x), norm_q.weight, norm_k.weight)
        for x, (q, k, v, norm_q, norm_k) in zip(inputs, layers, strict=True)
    ]
    joint = differentiable.qk_norm_rope(streams, rope, heads=3, eps=EPS)
    torch.testing.assert_close(list(joint), seen)
    upstream = [torch.randn_like(part) for part in joint]
    torch.testing.assert_close(grads(joint, inputs, upstream), grads(seen, inputs, upstream))


@pytest.mark.parametrize("qk_norm", ["rms_norm", None])
def test_joint_buffers_equal_sd3(monkeypatch, qk_norm):
    attention = Attention(
        query_dim=48, added_kv_proj_dim=48, dim_head=16, heads=3, out_dim=48, context_pre_only=False,
        bias=True, processor=JointAttnProcessor2_0(), qk_norm=qk_norm, eps=EPS,
    )  # fmt: skip
    image, text = randn(2, 4, 48), randn(2, 3, 48)
    seen = []

    def record(query, key, value, **_):
        seen.extend(part.transpose(1, 2) for part in (query, key, value))
        return query

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    attention(image, text)
    projections = [
        [layer(x) for layer in layers]
        for x, layers in (
            (image, (attention.to_q, attention.to_k, attention.to_v)),
            (text, (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj)),
        )
    ]
    norms = [(attention.norm_q, attention.norm_k), (attention.norm_added_q, attention.norm_added_k)]
    streams = [
        Stream(*parts, *(norm and norm.weight for norm in pair))
        for parts, pair in zip(projections, norms, strict=True)
    ]
    torch.testing.assert_close(list(qk_rope_ops.qk_norm_rope(streams, None, heads=3, eps=EPS)), seen)


def test_value_of_a_single_stream_is_not_copied():
    wide = randn(2, 5, 3 * 48)
    stream = Stream(*wide.chunk(3, dim=-1))
    _, _, value = qk_rope_ops.qk_norm_rope([stream], None, heads=3)
    assert value.data_ptr() == stream.value.data_ptr()
    assert torch.equal(value.flatten(2), stream.value)
    dv = randn(1, 7, 3, 16)
    streams = [Stream(randn(1, 3, 48), randn(1, 3, 48), None), Stream(randn(1, 4, 48), randn(1, 4, 48), None)]
    grads_of = qk_rope_ops.qk_norm_rope_backward(randn(1, 7, 3, 16), randn(1, 7, 3, 16), dv, streams, None)
    assert grads_of[1][2].data_ptr() == dv[:, 3:].data_ptr()


def test_gelu_writes_only_its_slice():
    x = randn(*SHAPE)
    buffer = torch.full((2, 5, 64), float("nan"))
    out = gelu_ops.gelu_tanh(x, buffer[..., 16:])
    assert out.data_ptr() == buffer[..., 16:].data_ptr()
    torch.testing.assert_close(buffer[..., 16:], functional.gelu(x, approximate="tanh"))
    assert buffer[..., :16].isnan().all()
    dy = randn(2, 5, 64)
    expected = gelu_reference.gelu_tanh_backward(dy[..., 16:], x)
    assert torch.equal(gelu_ops.gelu_tanh_backward(dy[..., 16:], x, x), expected)
    assert torch.equal(x, expected)


def test_fp16_is_clipped_on_request():
    x = torch.tensor([[[6e4, -6e4, 1.0]]], dtype=torch.float16)
    gate = torch.ones(1, 3, dtype=torch.float16)
    clipped = modulation_ops.gated_residual(x, gate, x, clip=True)
    assert clipped.tolist() == (x + x).clip(-65504, 65504).tolist() == [[[65504.0, -65504.0, 2.0]]]
    assert modulation_ops.gated_residual(x, gate, x)[0, 0, 0] == float("inf")
    wide = modulation_ops.gated_residual(x.float(), gate.float(), x.float(), clip=True)
    assert wide[0, 0, 0] == 12e4


def test_results_are_written_into_out():
    x, update, dy = (randn(*SHAPE) for _ in range(3))
    gate, scale, shift = modulation(3)
    buffer = torch.full((2, 5, 64), float("nan"))
    out = buffer[..., 16:]
    for function, arguments, index in (
        (modulation_ops.layer_norm_modulate, (x, scale, shift), None),
        (modulation_ops.gated_residual, (x, gate, update), None),
        (modulation_ops.gated_residual_backward, (dy, gate), None),
        (modulation_ops.gated_residual_grads, (dy, gate, update), 0),
    ):
        out.fill_(float("nan"))
        expected, actual = function(*arguments), function(*arguments, out=out)
        torch.testing.assert_close(actual, expected)
        assert (actual if index is None else actual[index]).data_ptr() == out.data_ptr()
        with raises("out: got strides"):
            function(*arguments, out=x.mT.contiguous().mT)
    assert buffer[..., :16].isnan().all()


def test_gradients_of_projections_are_written_into_out():
    streams = [Stream(*randn(2, 2, rows, 48), None, *torch.rand(2, 16)) for rows in (3, 4)]
    grads_in = randn(3, 2, 7, 3, 16)
    buffers = [torch.full((2, rows, 3 * 48 + 8), float("nan")) for rows in (3, 4)]
    out = [buffer[..., : 3 * 48].chunk(3, dim=-1) for buffer in buffers]
    actual = qk_rope_ops.qk_norm_rope_backward(*grads_in, streams, None, out=out)
    expected = qk_rope_ops.qk_norm_rope_backward(*grads_in, streams, None)
    torch.testing.assert_close([tuple(slices) for slices in actual], expected)
    assert all(buffer[..., 3 * 48 :].isnan().all() for buffer in buffers)
    torch.testing.assert_close(buffers[1][..., : 3 * 48], torch.cat(expected[1], dim=-1))
    with raises("out: got 1, .*2 streams"):
        qk_rope_ops.qk_norm_rope_backward(*grads_in, streams, None, out=out[:1])
    with raises("out\\[1\\]: got strides"):
        qk_rope_ops.qk_norm_rope_backward(
            *grads_in, streams, None, out=[out[0], (*out[1][:2], randn(2, 4, 48))]
        )


def test_differentiable_residual_and_gelu():
    x, update, dy = (randn(*SHAPE).requires_grad_() for _ in range(3))
    gate = randn(2, 48).requires_grad_()
    expected = grads(functional.gelu(x + gate[:, None] * update, approximate="tanh"), (x, gate, update), dy)
    ours = differentiable.gelu_tanh(differentiable.gated_residual(x, gate, update))
    torch.testing.assert_close(grads(ours, (x, gate, update), dy), expected)
    frozen = gate.detach()
    ours = differentiable.gelu_tanh(differentiable.gated_residual(x, frozen, update))
    torch.testing.assert_close(grads(ours, (x, update), dy), (expected[0], expected[2]))


def op_arguments():
    x, update, dy = (randn(2, 8, 64, dtype=torch.bfloat16)[:, 3:, 8:56] for _ in range(3))
    scale, shift, gate = modulation(3, torch.bfloat16)
    weight, angles = torch.rand(16), torch.randn(10, 16)
    norms, pair = [weight, weight], [x, update]
    joint = randn(2, 3, 10, 16, dtype=torch.bfloat16).transpose(1, 2)
    return {
        "layer_norm_modulate": (x, scale, shift, EPS),
        "layer_norm_modulate_backward": (dy, x, scale, update, EPS),
        "layer_norm_modulate_grads": (dy, x, scale, None, EPS),
        "gated_residual": (x, gate, update, True),
        "gated_residual_backward": (dy, gate),
        "gated_residual_grads": (dy, gate, update),
        "gelu_tanh_": (dy, x),
        "gelu_tanh_backward_": (update, dy, x),
        "gelu_tanh_gradients_": (update[0], dy[0], x[0], x[0, :, :5], dy[0, :, 40:]),
        "copy_rows_": (update, x),
        "qk_norm_rope": (pair, pair, pair, norms, norms, angles, angles, 3, EPS),
        "qk_norm_rope_backward": (joint, joint, pair, pair, norms, norms, angles, angles, EPS),
    }


@pytest.mark.parametrize("name", list(op_arguments()))
def test_ops_pass_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.halfbyte, name).default, op_arguments()[name])


def test_everything_compiles_in_one_graph():
    x, text = randn(2, 5, 48).requires_grad_(), randn(2, 3, 48)
    parts = modulation(3)
    angles = torch.randn(8, 16)

    def block(x, text, scale, shift, gate, cos, sin):
        normed = differentiable.layer_norm_modulate(x, scale, shift)
        streams = [Stream(text, text + 1, text + 2), Stream(normed, normed + 1, normed + 2)]
        query, _, value = differentiable.qk_norm_rope(streams, (cos, sin), heads=3)
        joint = torch.empty(2, 5, 96)
        gelu_ops.gelu_tanh(normed.detach(), joint[..., 48:])
        joint[..., :48] = (query * value)[:, 3:].flatten(2)
        return (
            differentiable.gated_residual(x, gate, differentiable.gelu_tanh(joint[..., :48]))
            + joint[..., 48:]
        )

    arguments = (x, text, *parts, angles, angles)
    expected = block(*arguments)
    actual = torch.compile(block, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(actual, expected)
    dy = torch.randn_like(actual)
    torch.testing.assert_close(grads(actual, x, dy), grads(expected, x, dy))


def test_bad_arguments_are_named():
    x, scale = randn(*SHAPE), randn(2, 48)
    with raises("x: got shape \\(5, 48\\), .*\\(B, S, D\\)"):
        modulation_ops.layer_norm_modulate(x[0], scale, scale)
    with raises("x: got torch.float64"):
        modulation_ops.layer_norm_modulate(x.double(), scale, scale)
    with raises("shift: got shape \\(1, 48\\), .*\\(2, 48\\)"):
        modulation_ops.layer_norm_modulate(x, scale, scale[:1])
    with raises("gate: got torch.int64"):
        modulation_ops.gated_residual(x, scale.long(), x)
    with raises("residual_grad: got shape"):
        modulation_ops.layer_norm_modulate_backward(x, x, scale, x[:, 1:])
    with raises("update: got shape"):
        modulation_ops.gated_residual_grads(x, scale, x[:, 1:])
    with raises("out: got strides"):
        gelu_ops.gelu_tanh(x, x.mT.contiguous().mT)
    with raises("dy: got shape"):
        gelu_ops.gelu_tanh_backward(x[:, 1:], x)
    with raises("gb: got torch.float32 \\(4, 3\\), .*torch.float32 and.* 5 rows"):
        gelu_ops.gelu_tanh_gradients(x[0], x[0], x[0, 1:, :3], x[0], x[0])
    with raises("xa: got torch.float64"):
        gelu_ops.gelu_tanh_gradients(x[0], x[0], x[0], x[0].double(), x[0])
    with raises("out: got torch.float32 \\(2, 5, 47\\), .*torch.float32 \\(2, 5, 48\\)"):
        copy_ops.copy_rows(x, x[..., 1:])
    with raises("x: got shape \\(5, 48\\), .*\\(B, S, D\\)"):
        copy_ops.copy_rows(x[0])


def test_bad_streams_are_named():
    x, weight = randn(*SHAPE), torch.rand(16)
    good = Stream(x, x, x, weight, weight)
    angles = (torch.randn(5, 16), torch.randn(5, 16))
    for streams, rope, heads, message in (
        ([], None, 3, "streams: got 0,"),
        ([good], None, 5, "heads: got 5 for 48 columns"),
        ([good], (angles[0], angles[1].half()), 3, "rope: sin: got torch.float16"),
        ([good, good], angles, 3, "rope: cos: got torch.float32 \\(5, 16\\)"),
        ([good._replace(key=x[:, 1:])], None, 3, "streams\\[0\\].key: got shape"),
        ([good, good._replace(value=x.half())], None, 3, "streams\\[1\\].value: got torch.float16"),
        ([good, Stream(x, x, x)], None, 3, "streams\\[1\\].query_norm: "),
        ([good._replace(key_norm=weight[1:])], None, 3, "streams\\[0\\].key_norm: got shape \\(15,\\)"),
        ([good._replace(value=None)], None, 3, "streams: got .*value"),
        ([good._replace(query=x[0])], None, 3, "streams\\[0\\].query: got shape"),
    ):
        with raises(message):
            qk_rope_ops.qk_norm_rope(streams, rope, heads=heads)
    joint = randn(2, 5, 3, 16)
    with raises("dk: got shape"):
        qk_rope_ops.qk_norm_rope_backward(joint, joint[:, 1:], joint, [good], None)
