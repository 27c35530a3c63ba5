"""Tests the 4-bit format: reference and ops against bitsandbytes and exact arithmetic, and edge cases."""

import bitsandbytes.functional as bnb
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from halfbyte.kernels.quantize_4bit import ops, reference
from halfbyte.quant.formats.nf4 import BeyondFormatError, QuantSpec, dequantize, quantize

SHAPES = [(64, 64), (192, 128), (30, 50), (1, 1), (1, 64), (7, 9), (129, 257), (3, 64, 5), (1, 127)]


def gaussian(shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unpacked(packed, numel):
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).view(-1)[:numel]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_tables_equal_those_of_bitsandbytes(quant_type):
    assert torch.equal(reference.CODES[quant_type], bnb.get_4bit_type(quant_type, device="cpu"))
    assert torch.equal(reference.DYNAMIC_CODE, bnb.create_dynamic_map())
    assert reference.DYNAMIC_CODE[127] == 0


def test_even_elements_are_in_the_high_nibble():
    packed, absmax = ops.quantize_4bit(torch.tensor([1.0, -1.0, 0.5, 0.0]), "nf4", 64)
    assert bytes(packed.flatten().tolist()).hex() == "f0c7"
    assert absmax.tolist() == [1.0]


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_codes_and_absmax_equal_bitsandbytes(shape):
    weight = gaussian(shape)
    packed, absmax = ops.quantize_4bit(weight, "nf4", 64)
    expected, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    assert torch.equal(packed, expected)
    assert torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nf4_equals_bitsandbytes_for_other_dtypes_and_block_sizes(dtype, blocksize):
    weight = gaussian((128, 128), dtype)
    packed, absmax = ops.quantize_4bit(weight, "nf4", blocksize)
    expected, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=blocksize)
    assert torch.equal(packed, expected)
    assert torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("shape", SHAPES)
def test_fp4_codes_equal_bitsandbytes_except_on_boundaries(shape):
    # bitsandbytes' CPU code uses the midpoints as boundaries, and either of the two zeros of FP4 for zero. We use the
    # boundaries of its CUDA kernel.
    weight = gaussian(shape)
    packed, absmax = ops.quantize_4bit(weight, "fp4", 64)
    expected, state = bnb.quantize_4bit(weight, quant_type="fp4", blocksize=64)
    assert torch.equal(absmax, state.absmax)
    scale = absmax.repeat_interleave(64)[: weight.numel()]
    distance = (weight.flatten().float() / scale).abs().unsqueeze(1) - reference.FP4_BOUNDARIES
    undecided = distance.abs().amin(1) < 1e-6
    tiny = (weight.flatten().float() / scale).abs() < reference.FP4_BOUNDARIES[0]
    ours, theirs = unpacked(packed, weight.numel()), unpacked(expected, weight.numel())
    assert torch.equal(ours[~undecided & ~tiny], theirs[~undecided & ~tiny])
    assert set((ours[tiny] & 7).tolist()) | set((theirs[tiny] & 7).tolist()) <= {0}
    # On a boundary, both codes are equally near.
    values = weight.flatten().double() / scale
    errors = [(reference.FP4_CODE[codes.int()].double() - values).abs() for codes in (ours, theirs)]
    assert (errors[0] - errors[1]).abs().max() < 1e-6


def test_every_ratio_of_bf16_values_gets_the_nearest_nf4_code():
    # Weight and absmax are a significand of 128 to 255 times a power of two. Kernels multiply by the reciprocal of the
    # absmax. The rounded product must be on the same side of each boundary as the exact quotient.
    significand = torch.arange(128, 256, dtype=torch.float64)
    for exponent in range(9):
        exact = significand.unsqueeze(1) / significand / 2**exponent
        exact = torch.cat([exact, -exact]).flatten()
        exact = exact[exact.abs() <= 1]
        rounded = (significand.float() / 2**exponent).unsqueeze(1) * (1 / significand.float())
        rounded = torch.cat([rounded, -rounded]).flatten()
        rounded = rounded[rounded.abs() <= 1]
        boundaries = reference.NF4_BOUNDARIES
        assert torch.equal(torch.bucketize(rounded, boundaries), torch.bucketize(exact, boundaries.double()))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(256, 192), (65, 64), (9, 7)])
def test_dequantized_weights_are_bitwise_those_of_bitsandbytes(quant_type, double_quant, dtype, shape):
    # Only shapes with row lengths that are odd or multiples of 64: bitsandbytes' AVX-512 code is wrong for others.
    weight = gaussian(shape, dtype)
    packed, state = bnb.quantize_4bit(
        weight, quant_type=quant_type, compress_statistics=double_quant, blocksize=64
    )
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles its fallback, which takes seconds
        expected = bnb.dequantize_4bit(packed, state)
    code = reference.CODES[quant_type]
    if double_quant:
        nested = state.state2
        ours = ops.dequantize_4bit_double(
            packed, state.absmax, nested.absmax, state.offset, code, nested.code, shape, dtype, 64, 256
        )
    else:
        ours = ops.dequantize_4bit(packed, state.absmax, code, shape, dtype, 64)
    assert ours.dtype == dtype
    assert torch.equal(ours, expected)


def test_double_quantization_matches_bitsandbytes_within_one_step():
    weight = gaussian((1024, 3072))
    packed, codes, nested_absmax, offset = ops.quantize_4bit_double(weight, "nf4", 64, 256)
    expected, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    assert torch.equal(packed, expected)
    torch.testing.assert_close(offset, state.offset, rtol=1e-6, atol=0)
    torch.testing.assert_close(nested_absmax, state.state2.absmax, rtol=1e-6, atol=0)
    steps = (codes.int() - state.absmax.int()).abs()
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < 3e-3
    assert offset.dim() == 0


@pytest.mark.parametrize(("quant_type", "error"), [("nf4", 0.0920), ("fp4", 0.1219)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_relative_error_on_gaussian_weights(quant_type, error, double_quant):
    weight = gaussian((512, 1024), torch.float32)
    packed, state = quantize(weight, QuantSpec(quant_type, double_quant))
    difference = dequantize(packed, state).double() - weight.double()
    assert (difference.pow(2).mean() / weight.double().pow(2).mean()).sqrt() == pytest.approx(error, abs=1e-3)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_blocks_of_zeros_are_restored_as_zeros(quant_type, double_quant):
    weight = gaussian((4, 100))
    weight.view(-1)[64:192] = 0
    weight.view(-1)[384:] = 0  # the tail
    packed, state = quantize(weight, QuantSpec(quant_type, double_quant=double_quant))
    restored = dequantize(packed, state)
    assert restored.isfinite().all()
    if double_quant:  # rounding changes the scale of zero, but the codes stand for zero
        nibbles = unpacked(packed, weight.numel())
        assert (reference.CODES[quant_type][nibbles[64:192].int()] == 0).all()
    assert (restored.flatten()[64:192] == 0).all()
    assert (restored.flatten()[384:] == 0).all()


def test_weight_of_zeros_is_restored_as_zeros():
    packed, state = quantize(torch.zeros(3, 5, dtype=torch.bfloat16), QuantSpec())
    assert torch.equal(dequantize(packed, state), torch.zeros(3, 5, dtype=torch.bfloat16))


@pytest.mark.parametrize("largest", [1e-39, 1e-38, 3e38])
def test_extreme_scales_stay_finite(largest):
    weight = torch.linspace(-1, 1, 128) * largest
    packed, state = quantize(weight, QuantSpec(double_quant=False))
    assert dequantize(packed, state).isfinite().all()


@pytest.mark.parametrize("scale_search", [None, "mse"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("largest", [1e38, 3e38])
def test_weights_near_the_fp32_maximum_are_restored_finite(largest, double_quant, scale_search):
    spread = (2 * torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) - 1) * largest
    for weight in (torch.full((64, 64), largest), spread):
        restored = dequantize(*quantize(weight, QuantSpec("nf4", double_quant, scale_search=scale_search)))
        assert restored.isfinite().all()
        assert (restored / largest - weight / largest).norm() / (weight / largest).norm() < 0.15


@pytest.mark.parametrize("scale_search", [None, "mse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_that_would_not_be_restored_finite_are_rejected(dtype, scale_search):
    rejected_count = 0
    for seed in range(8):
        uniform = 2 * torch.rand(128, 128, generator=torch.Generator().manual_seed(seed)).double() - 1
        weight = (uniform * torch.finfo(dtype).max).to(dtype)
        # Without double quantization, a scale is a magnitude of the weight or fits by construction of the search.
        spec = QuantSpec(double_quant=False, scale_search=scale_search)
        assert dequantize(*quantize(weight, spec)).isfinite().all()
        try:
            restored = dequantize(*quantize(weight, QuantSpec(scale_search=scale_search), "a.weight"))
        except ValueError as error:
            assert isinstance(error, BeyondFormatError)  # noqa: PT017
            assert str(error).startswith("a.weight: ")  # noqa: PT017
            rejected_count += 1
        else:
            assert restored.isfinite().all()
    assert rejected_count


# Covers sizes one element above or below a multiple of a block, a byte and a nested block.
@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    double_quant=st.booleans(),
    blocksize=st.sampled_from([32, 64, 256]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_any_shape_is_restored_within_half_a_gap(shape, quant_type, double_quant, blocksize, dtype, seed):
    weight = gaussian(shape, dtype, seed)
    packed, state = quantize(weight, QuantSpec(quant_type, double_quant, blocksize))
    numel = weight.numel()
    assert packed.shape == ((numel + 1) // 2, 1)
    assert state.absmax.shape == (-(-numel // blocksize),)
    restored = dequantize(packed, state, torch.float32)
    assert restored.shape == weight.shape
    absmax = ops.quantize_4bit(weight, quant_type, blocksize)[1]
    scale = absmax.repeat_interleave(blocksize)[:numel].view(shape)
    half_gap = reference.CODES[quant_type].sort().values.diff().max() / 2
    # The error of a nested scale is at most half an 8-bit step of the largest deviation.
    slack = 1 + (0.01 * (absmax - absmax.mean()).abs().max() / absmax.min() if double_quant else 1e-6)
    assert ((restored - weight.float()).abs() <= half_gap * scale * slack + scale * (slack - 1)).all()


@settings(max_examples=15, deadline=None)
@given(numel=st.integers(1, 700), quant_type=st.sampled_from(["nf4", "fp4"]), seed=st.integers(0, 1000))
def test_quantizing_a_dequantized_weight_changes_nothing(numel, quant_type, seed):
    spec = QuantSpec(quant_type, double_quant=False)
    packed, state = quantize(gaussian((numel,), torch.float32, seed), spec)
    again, state_again = quantize(dequantize(packed, state), spec)
    assert torch.equal(dequantize(again, state_again), dequantize(packed, state))


SAMPLES = {
    "quantize_4bit": lambda w, s, d: (w, "nf4", 64),
    "quantize_4bit_double": lambda w, s, d: (w, "nf4", 64, 256),
    "dequantize_4bit": lambda w, s, d: (s[0], s[1], reference.NF4_CODE, list(w.shape), torch.bfloat16, 64),
    "dequantize_4bit_double": lambda w, s, d: (
        *d, reference.NF4_CODE, reference.DYNAMIC_CODE, list(w.shape), torch.bfloat16, 64, 256,
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", SAMPLES)
@pytest.mark.parametrize("shape", [(64, 96), (5, 7)])
def test_ops_pass_opcheck(op, shape):
    weight = gaussian(shape)
    arguments = SAMPLES[op](
        weight, ops.quantize_4bit(weight, "nf4", 64), ops.quantize_4bit_double(weight, "nf4", 64, 256)
    )
    torch.library.opcheck(getattr(torch.ops.halfbyte, op).default, arguments)


@pytest.mark.parametrize("op", SAMPLES)
def test_registered_kernels_equal_the_reference(op):
    weight = gaussian((96, 100))
    arguments = SAMPLES[op](
        weight, ops.quantize_4bit(weight, "nf4", 64), ops.quantize_4bit_double(weight, "nf4", 64, 256)
    )
    ours, expected = getattr(ops, op)(*arguments), ops.REFERENCE[op](*arguments)
    if isinstance(ours, torch.Tensor):
        ours, expected = (ours,), (expected,)
    for tensor, right in zip(ours, expected, strict=True):
        assert torch.equal(tensor, right)


def test_moving_a_state_keeps_its_dtypes():
    _, state = quantize(gaussian((64, 64)), QuantSpec())
    moved = state.to("meta")
    assert moved.nested is not None
    assert (moved.absmax.device.type, moved.absmax.dtype) == ("meta", torch.uint8)
    assert (moved.nested.absmax.device.type, moved.nested.absmax.dtype) == ("meta", torch.float32)
    assert state.to("cpu") is state
    assert state.nbytes == 64 + 4 + 4 * (16 + 256 + 1)


@pytest.mark.parametrize(
    ("weight", "pattern"),
    [
        (torch.tensor([1.0, float("nan")]), "NaN"),
        (torch.tensor([1.0, float("-inf")], dtype=torch.bfloat16), "infinite"),
        (torch.empty(0, 8), "empty"),
        (torch.ones(8, dtype=torch.int32), "torch.int32"),
        (torch.ones(8, dtype=torch.float64), "torch.float64"),
    ],
)
def test_weights_that_cannot_be_quantized_are_rejected_by_name(weight, pattern):
    with pytest.raises(ValueError, match=r"blocks\.0\.weight.*" + pattern):
        quantize(weight, QuantSpec(), "blocks.0.weight")


def test_spec_rejects_invalid_settings():
    with pytest.raises(ValueError, match=r"^quant_type: .*'int4'.*nf4, fp4"):
        QuantSpec("int4")
    for blocksize in (48, 64.0, True, "64"):
        with pytest.raises(ValueError, match=f"^blocksize: got {blocksize!r}.* 32, 64"):
            QuantSpec(blocksize=blocksize)
