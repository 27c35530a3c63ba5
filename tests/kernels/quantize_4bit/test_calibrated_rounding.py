"""Checks GPTQ rounding against a slow float64 form of the algorithm and against plain rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.kernels.quantize_4bit import reference
from halfbyte.kernels.quantize_4bit.gptq import output_error, round_calibrated
from halfbyte.quant.formats.nf4 import QuantSpec, dequantize, quantize

GPU = pytest.mark.gpu
both_types = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows, width, seed=0):
    """Returns inputs with a nonzero mean, in which some directions are a hundred times larger than others."""
    mixed = gaussian(rows, width, seed=seed) @ torch.diag(torch.logspace(0, -2, width))
    return mixed @ torch.linalg.qr(gaussian(width, width, seed=seed + 1)).Q + gaussian(width, seed=seed + 2)


def plain(weight, quant_type="nf4"):
    packed, state = quantize(weight, QuantSpec(quant_type, double_quant=False))
    return packed, state, dequantize(packed, state, torch.float32)


def calibrated(weight, moment, quant_type="nf4"):
    _, state, _ = plain(weight, quant_type)
    packed = round_calibrated(weight, moment, state.absmax, quant_type, 64)
    return dequantize(packed, state, torch.float32)


def one_by_one(weight, moment, scale, quant_type):
    """Rounds by optimal brain quantization in a fixed order, in float64, with a new inverse per column."""
    moment = moment.double()
    moment = moment + 0.02 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    order = moment.diagonal().argsort(descending=True, stable=True).tolist()
    table = reference.CODES[quant_type].double()
    left, result = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    for done, column in enumerate(order):
        rest = order[done:]
        inverse = torch.linalg.inv(moment[rest][:, rest])
        steps = scale.double().view(len(weight), -1)[:, column // 64]
        distance = (left[:, column, None] / steps[:, None] - table).abs()
        result[:, column] = table[distance.argmin(dim=1)] * steps
        error = (left[:, column] - result[:, column]) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    return result


@both_types
def test_it_equals_the_slow_algorithm(quant_type):
    weight = gaussian(48, 128)
    x = correlated(600, 128, seed=3)
    moment = x.t() @ x
    _, state, _ = plain(weight, quant_type)
    expected = one_by_one(weight, moment, state.absmax, quant_type)
    found = calibrated(weight, moment, quant_type).double()
    # In fp32 a value near a boundary may fall on the other side of it, which changes the rest of its row.
    same = (found - expected).abs().amax(dim=1) < 1e-5
    assert same.float().mean() > 0.8
    errors = [output_error(weight - values, moment).item() for values in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@both_types
def test_output_error_is_smaller(quant_type):
    weight = gaussian(64, 256) * 0.02
    x = correlated(4096, 256)
    unseen = correlated(4096, 256, seed=0)[:2048] + 0.1 * gaussian(2048, 256, seed=9)
    moment = x[2048:].t() @ x[2048:]
    *_, before = plain(weight, quant_type)
    after = calibrated(weight, moment, quant_type)
    for inputs in (x[2048:], x[:2048], unseen):
        errors = [(inputs @ (values - weight).t()).norm() for values in (before, after)]
        assert errors[1] < 0.75 * errors[0]


@both_types
def test_uncorrelated_or_zero_inputs_give_the_nearest_values(quant_type):
    weight = gaussian(32, 192).bfloat16().float()
    _, state, before = plain(weight, quant_type)
    steps = state.absmax.repeat_interleave(64).view(32, 192, 1)
    nearest = (weight.unsqueeze(-1) - reference.CODES[quant_type] * steps).abs().amin(-1)
    for moment in (torch.eye(192), torch.zeros(192, 192)):
        values = calibrated(weight, moment, quant_type)
        assert ((values - weight).abs() - nearest).abs().max() < 1e-6
        # bitsandbytes' boundaries are the midpoints of nf4's values, but not of all of fp4's.
        assert quant_type == "fp4" or torch.equal(values, before)


@pytest.mark.gpu
@both_types
def test_gpu_error_equals_cpu_error(quant_type):
    weight = gaussian(512, 3072)
    x = correlated(4096, 3072, seed=3)
    moment = x.t() @ x
    _, state, _ = plain(weight, quant_type)
    packed = [
        round_calibrated(weight.to(device), moment.to(device), state.absmax.to(device), quant_type, 64).cpu()
        for device in ("cpu", "cuda")
    ]
    errors = [
        output_error(weight - dequantize(codes, state, torch.float32), moment).item() for codes in packed
    ]
    # Another order of additions moves some values across a boundary, which changes the rest of their rows.
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_output_error_equals_the_error_of_the_outputs():
    difference, x = gaussian(8, 64), gaussian(100, 64, seed=1)
    expected = (x.double() @ difference.double().t()).square().sum()
    assert output_error(difference, x.t() @ x).item() == pytest.approx(expected.item(), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    outputs=st.integers(1, 5),
    blocks=st.integers(1, 4),
    rows=st.integers(1, 40),
    zeros=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_results_of_every_shape_are_finite_and_bounded(outputs, blocks, rows, zeros, seed):
    weight = gaussian(outputs, 64 * blocks, seed=seed)
    if zeros:
        weight[0] = 0
    x = gaussian(rows, 64 * blocks, seed=seed + 1)
    values = calibrated(weight, x.t() @ x)
    assert values.shape == weight.shape
    assert values.isfinite().all()
    # No value exceeds its block's absmax.
    limit = weight.abs().view(outputs, blocks, 64).amax(-1, keepdim=True)
    assert (values.view(outputs, blocks, 64).abs() <= limit * (1 + 1e-6)).all()
    if zeros:
        assert not values[0].any()


def test_zero_and_negative_scales_give_codes_of_zero():
    weight = gaussian(4, 128)
    scale = torch.tensor([1.0, 0.0, -1e-6, 2.0, 1.0, 1.0, 1.0, 1.0])
    packed = round_calibrated(weight, torch.eye(128), scale, "nf4", 64)
    blocks = torch.stack([packed >> 4, packed & 0xF], dim=1).view(8, 64)
    assert (blocks[1:3] == 7).all()
    assert (blocks[3] != 7).any()


def test_an_indefinite_moment_is_damped_until_it_is_positive_definite():
    weight = gaussian(16, 128)
    direction = gaussian(128)
    moment = torch.outer(direction, direction)
    moment -= 0.05 * moment.diagonal().mean() * torch.eye(128)
    values = calibrated(weight, moment)
    assert values.isfinite().all()
    assert (values - weight).norm() < 0.3 * weight.norm()


def test_a_nan_in_the_moment_is_refused():
    moment = torch.eye(64)
    moment[3, 5] = moment[5, 3] = float("nan")
    with pytest.raises(ValueError, match="second moment"):
        round_calibrated(gaussian(2, 64), moment, torch.ones(2), "nf4", 64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_bad_diagonal_of_the_moment_is_refused(bad):
    moment = torch.eye(64)
    moment.fill_diagonal_(bad)
    with pytest.raises(ValueError, match="second moment"):
        round_calibrated(gaussian(2, 64), moment, torch.ones(2), "nf4", 64)


def test_blocks_that_cross_row_ends_are_refused():
    with pytest.raises(ValueError, match="rows of 96"):
        round_calibrated(gaussian(2, 96), torch.eye(96), torch.ones(3), "nf4", 64)
