"""AdamW with 8-bit moments, compared with bitsandbytes and fp32 AdamW, and the kernel with the reference."""

import bitsandbytes
import pytest
import torch

from halfbyte.kernels.adamw_8bit.reference import BLOCK, AdamStep, Moments, codes, update
from halfbyte.trainer.optim.adamw_8bit import AdamW8bit

SHAPES = [(4, 48), (40, 4), (16, 300), (3000,), (1,), (8, 256)]
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
CPU = torch.device("cpu")


def moments_of(count):
    blocks = -(-count // BLOCK)
    return Moments(
        torch.zeros(count, dtype=torch.uint8),
        torch.zeros(blocks),
        torch.zeros(count, dtype=torch.uint8),
        torch.zeros(blocks),
    )


def drawn(shape, seed, spread=0.0):
    """Returns normal numbers whose magnitudes spread over `spread` decades."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draws) * 10 ** (-spread * torch.rand(shape, generator=draws))


def named(device="cpu"):
    return [(str(i), torch.nn.Parameter(drawn(shape, i).to(device))) for i, shape in enumerate(SHAPES)]


def test_the_codes_equal_those_of_bitsandbytes():
    mean, square = codes(CPU)
    assert torch.equal(mean, bitsandbytes.functional.create_dynamic_map(signed=True))
    assert torch.equal(square, bitsandbytes.functional.create_dynamic_map(signed=False))


def test_steps_match_those_of_bitsandbytes():
    """Values halfway between two codes may differ. Gradients have similar sizes, so bitsandbytes rounds none
    to zero."""
    count = 4 * BLOCK
    ours, theirs = drawn(count, 0), drawn(count, 0)
    moments, theirs_state = moments_of(count), moments_of(count)
    mean_codes, square_codes = codes(CPU)
    for number in range(1, 6):
        gradient = drawn(count, 100 + number)
        gradient = gradient + gradient.sign() / 2
        update(ours, gradient, moments, AdamStep(number, **SETTINGS))
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            "adam",
            gradient.clone(),
            theirs,
            theirs_state.mean,
            theirs_state.square,
            *SETTINGS["betas"],
            0.0,
            0.0,
            SETTINGS["eps"],
            number,
            SETTINGS["lr"],
            mean_codes,
            square_codes,
            theirs_state.mean_scale,
            theirs_state.square_scale,
            SETTINGS["weight_decay"],
            1.0,
            False,
        )
        for one, other, table in (
            (moments.mean, theirs_state.mean, mean_codes),
            (moments.square, theirs_state.square, square_codes),
        ):
            assert (one != other).float().mean() < 0.01
            # The largest gap between codes. Near zero, where codes are dense, a rounding error may cross
            # several.
            assert (table[one.int()] - table[other.int()]).abs().max() < 0.015
        assert torch.allclose(moments.mean_scale, theirs_state.mean_scale, rtol=1e-5)
        assert torch.allclose(moments.square_scale, theirs_state.square_scale, rtol=1e-5)
    assert (ours - theirs).norm() < 2e-3 * (ours - drawn(count, 0)).norm()


def test_parameters_move_like_those_of_fp32_adamw():
    """Takes many steps of steady and noisy gradients; rounding the moments costs a few percent of the
    distance."""
    ours, theirs = named(), named()
    optimizers = AdamW8bit(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    for number in range(40):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for index, (_, parameter) in enumerate(parameters):
                steady = drawn(parameter.shape, index)
                parameter.grad = steady + drawn(parameter.shape, 1000 * index + number)
            optimizer.step()
    for index, ((_, one), (_, other)) in enumerate(zip(ours, theirs, strict=True)):
        distance = other - drawn(other.shape, index)
        assert (one - other).norm() < 0.05 * distance.norm(), SHAPES[index]


def test_the_second_moment_does_not_round_to_zero_before_the_first():
    """A large gradient sets the block's scale, and a small one appears once: its mean must not be divided by
    eps."""
    parameter, moments = torch.zeros(BLOCK), moments_of(BLOCK)
    gradient = torch.zeros(BLOCK)
    gradient[0] = 1.0
    gradient[1] = 1e-5
    update(parameter, gradient, moments, AdamStep(1, **SETTINGS))
    gradient[1] = 0.0
    update(parameter, gradient, moments, AdamStep(2, **SETTINGS))
    assert parameter.abs().max() < 0.1


def test_a_parameter_without_a_gradient_does_not_move():
    parameters = named()
    optimizer = AdamW8bit(parameters, **SETTINGS)
    for _, parameter in parameters[1:]:
        parameter.grad = torch.ones_like(parameter)
    before = parameters[0][1].detach().clone()
    optimizer.step()
    assert parameters[0][1].equal(before)
    assert not optimizer.state[parameters[0][1]]["mean_scale"].any()
    assert optimizer.state[parameters[1][1]]["mean_scale"].all()


@pytest.mark.gpu
def test_the_kernel_matches_the_reference():
    ours, theirs = named("cuda"), named()
    optimizers = AdamW8bit(ours, **SETTINGS), AdamW8bit(theirs, **SETTINGS)
    for number in range(6):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for index, (_, parameter) in enumerate(parameters):
                gradient = drawn(parameter.shape, 1000 * index + number, spread=4)
                skipped = number == 3 and index == 2
                parameter.grad = None if skipped else gradient.to(parameter.device)
            optimizer.step()
        for (_, one), (_, other) in zip(ours, theirs, strict=True):
            for name in ("mean", "square"):
                left, right = optimizers[0].state[one][name].cpu(), optimizers[1].state[other][name]
                assert (left != right).float().mean() <= 0.01
    for index, ((_, one), (_, other)) in enumerate(zip(ours, theirs, strict=True)):
        distance = other - drawn(other.shape, index)
        assert (one.cpu() - other).norm() < 1e-3 * distance.norm(), SHAPES[index]
