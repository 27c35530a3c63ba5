"""Timestep schemes, shifts, weightings, losses and schedules against diffusers' formulas and the papers'."""

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor
from torch.nn import functional as F

from halfbyte.trainer.objective.losses import L1, LOSSES, MSE, Huber, Loss
from halfbyte.trainer.objective.shift import SHIFTS, NoShift, ResolutionShift, StaticShift
from halfbyte.trainer.objective.timesteps import TIMESTEPS, CosMap, LogitNormal, Mode, TimestepScheme, Uniform
from halfbyte.trainer.objective.weighting import WEIGHTINGS, CosMapWeighting, NoWeighting, SigmaSqrt
from halfbyte.trainer.optim.optimizers import OPTIMIZERS, AdamW
from halfbyte.trainer.optim.schedules import SCHEDULES, Constant, Cosine, Linear
from halfbyte.trainer.registry import Registry

DRAWS = 200_000
EVENLY = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
SCHEMES = [
    Uniform(name="uniform"),
    LogitNormal(name="logit_normal"),
    LogitNormal(name="logit_normal", mean=0.8, std=1.7),
    Mode(name="mode"),
    Mode(name="mode", scale=-1.0),
    Mode(name="mode", scale=1.7519),
    CosMap(name="cosmap"),
]
ALL_SHIFTS = [
    NoShift(name="none"),
    StaticShift(name="static"),
    StaticShift(name="static", shift=0.25),
    ResolutionShift(name="resolution"),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.describe())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigmas_stay_strictly_inside_0_and_1_even_for_extreme_draws(
    scheme: TimestepScheme, dtype: torch.dtype
) -> None:
    u = torch.tensor([0.0, torch.finfo(dtype).tiny, 0.25, 0.5, 1 - torch.finfo(dtype).eps, 1.0], dtype=dtype)
    sigma = scheme.build().sigmas(u)
    assert sigma.dtype == torch.float32
    assert sigma.shape == u.shape
    assert bool(((sigma > 0) & (sigma < 1)).all())
    for shift in ALL_SHIFTS:
        shifted = shift.build().apply(sigma, 4096)
        assert shifted.dtype == torch.float32
        assert bool(((shifted > 0) & (shifted < 1)).all()), shift.describe()
    for weighting in (NoWeighting(name="none"), SigmaSqrt(name="sigma_sqrt"), CosMapWeighting(name="cosmap")):
        assert bool(weighting.build().weights(sigma).isfinite().all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.describe())
def test_schemes_are_monotonic_as_inverses_of_a_distribution_must_be(scheme: TimestepScheme) -> None:
    steps = scheme.sigmas(EVENLY).double().diff()
    # Rounding to fp32 may make neighbors equal, but it must not reverse their order.
    assert bool((steps >= 0).all() or (steps <= 0).all())


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.7), (-1.0, 1.5)])
def test_logit_normal_has_the_density_that_diffusers_draws_from(mean: float, std: float) -> None:
    theirs = compute_density_for_timestep_sampling(
        "logit_normal", DRAWS, logit_mean=mean, logit_std=std, generator=torch.Generator().manual_seed(0)
    )
    ours = LogitNormal(name="logit_normal", mean=mean, std=std).sigmas(EVENLY)
    assert _distance(ours, theirs) < 0.005
    # A flipped sign of the mean, or a std used as a variance, is far outside the bound above.
    assert _distance(1 - ours, theirs) > 0.05 or mean == 0


@pytest.mark.parametrize("scale", [1.29, 0.0, -0.5])
def test_mode_equals_diffusers_for_every_draw(scale: float) -> None:
    drawn = torch.rand(1000, generator=torch.Generator().manual_seed(3))
    theirs = compute_density_for_timestep_sampling(
        "mode", 1000, mode_scale=scale, generator=torch.Generator().manual_seed(3)
    )
    torch.testing.assert_close(Mode(name="mode", scale=scale).sigmas(drawn), theirs, rtol=1e-5, atol=1e-6)


def test_uniform_equals_diffusers_default_for_every_draw() -> None:
    drawn = torch.rand(1000, generator=torch.Generator().manual_seed(3))
    theirs = compute_density_for_timestep_sampling("none", 1000, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(Uniform(name="uniform").sigmas(drawn), theirs, rtol=0, atol=1e-7)


def test_cosmap_draws_with_the_density_that_diffusers_weights_by() -> None:
    sigma = CosMap(name="cosmap").sigmas(EVENLY).double()
    density, edges = numpy.histogram(sigma.numpy(), bins=50, range=(0, 1), density=True)
    middles = torch.from_numpy((edges[:-1] + edges[1:]) / 2)
    theirs = compute_loss_weighting_for_sd3("cosmap", middles)
    torch.testing.assert_close(torch.from_numpy(density), theirs, rtol=5e-3, atol=0)


@pytest.mark.parametrize("name", ["none", "sigma_sqrt", "cosmap"])
def test_weights_equal_those_of_diffusers(name: str) -> None:
    sigma = torch.linspace(1e-3, 1, 1000)
    ours = WEIGHTINGS[name](name=name).build().weights(sigma)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, compute_loss_weighting_for_sd3(name, sigma), rtol=1e-6, atol=0)


def test_sigma_sqrt_is_bounded_at_the_end_of_common_grids() -> None:
    weights = SigmaSqrt(name="sigma_sqrt").weights(torch.tensor([1e-7, 1e-3]))
    torch.testing.assert_close(weights, torch.tensor([1e6, 1e6]))


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_static_shift_equals_that_of_the_scheduler(shift: float) -> None:
    plain = FlowMatchEulerDiscreteScheduler(shift=1.0).sigmas[1:]
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas[1:]
    ours = StaticShift(name="static", shift=shift).build().apply(plain, 4096)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tokens", [16, 256, 1024, 4096, 9216])
def test_resolution_shift_is_what_the_flux_pipeline_samples_with(tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigma = torch.linspace(0.999, 0.001, 500)
    ours = ResolutionShift(name="resolution").build()
    mu = calculate_shift(tokens)
    assert ours.mu(tokens) == pytest.approx(mu, abs=1e-12)
    theirs = scheduler.time_shift(mu, 1.0, sigma)
    torch.testing.assert_close(ours.apply(sigma, tokens), theirs, rtol=1e-5, atol=1e-7)


def test_resolution_shift_follows_its_settings() -> None:
    settings = {"base_shift": 0.25, "max_shift": 2.0, "base_tokens": 64, "max_tokens": 1024}
    ours = ResolutionShift(name="resolution", **settings)
    theirs = calculate_shift(500, base_seq_len=64, max_seq_len=1024, base_shift=0.25, max_shift=2.0)
    assert ours.mu(500) == pytest.approx(theirs)
    assert "shift 1.28 to 7.39" in ours.describe()


def test_more_tokens_mean_more_noise_and_the_shift_none_changes_nothing() -> None:
    sigma = torch.tensor([0.1, 0.5, 0.9])
    small, large = (ResolutionShift(name="resolution").apply(sigma, tokens) for tokens in (256, 4096))
    assert bool((sigma < small).all() and (small < large).all())
    assert torch.equal(NoShift(name="none").apply(sigma, 4096), sigma)


@pytest.mark.parametrize(
    ("loss", "reference"),
    [
        (MSE(name="mse"), F.mse_loss),
        (L1(name="l1"), F.l1_loss),
        (Huber(name="huber", delta=0.3), lambda a, b: F.huber_loss(a, b, delta=0.3)),
    ],
    ids=["mse", "l1", "huber"],
)
def test_losses_equal_torchs_in_float64_averaged_over_each_sample(
    loss: Loss, reference: Callable[[Tensor, Tensor], Tensor]
) -> None:
    source = torch.Generator().manual_seed(0)
    prediction = torch.randn(3, 4, 9, 5, generator=source).bfloat16()
    target = torch.randn(3, 4, 9, 5, generator=source)
    each = loss.build().per_sample(prediction, target)
    assert each.dtype == torch.float32
    expected = [reference(p.double(), t.double()) for p, t in zip(prediction, target, strict=True)]
    torch.testing.assert_close(each.double(), torch.stack(expected), rtol=1e-6, atol=0)


def test_losses_refuse_to_broadcast() -> None:
    with pytest.raises(AssertionError):
        MSE(name="mse").per_sample(torch.zeros(2, 3), torch.zeros(2, 1))


def test_schedules_warm_up_and_end_at_their_documented_values() -> None:
    warm = Constant(name="constant", warmup_steps=4)
    assert [warm.factor(step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    line = Linear(name="linear")
    assert [line.factor(step, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    wave = Cosine(name="cosine", warmup_steps=2)
    assert wave.factor(2, 10) == 1.0
    assert wave.factor(6, 10) == pytest.approx(0.5)
    assert wave.factor(9, 10) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))


@pytest.mark.parametrize("name", list(SCHEDULES.classes))
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 7), (3, 7), (1, 1)])
def test_the_lr_factor_of_every_step_is_above_0_and_at_most_1(name: str, warmup: int, total: int) -> None:
    schedule = SCHEDULES[name](name=name, warmup_steps=warmup).build()
    assert all(0 < schedule.factor(step, total) <= 1 for step in range(total))


def test_adamw_equals_torchs_and_updates_only_trainable_parameters() -> None:
    learns, frozen = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2), requires_grad=False)
    reference = torch.nn.Parameter(torch.ones(3))
    choice = AdamW(name="adamw", lr=0.1, weight_decay=0.2, betas=(0.5, 0.75), eps=1e-3)
    ours = choice.build([("a", learns), ("b", frozen)])
    theirs = torch.optim.AdamW([reference], lr=0.1, weight_decay=0.2, betas=(0.5, 0.75), eps=1e-3)
    for step in range(3):
        gradient = torch.tensor([1.0, -2.0, 0.5 * step])
        learns.grad, reference.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
    assert torch.equal(learns, reference)
    assert torch.equal(frozen, torch.ones(2))
    assert [len(group["params"]) for group in ours.param_groups] == [1]
    assert ours.param_groups[0]["param_names"] == ["a"]


@pytest.mark.parametrize("registry", [TIMESTEPS, SHIFTS, WEIGHTINGS, LOSSES, OPTIMIZERS, SCHEDULES])
def test_every_choice_and_setting_has_a_description(registry: Registry[Any]) -> None:
    for name, choice in registry.classes.items():
        built = choice(name=name)
        assert built.describe().startswith(name)
        assert choice.__doc__
        for setting, field in choice.model_fields.items():
            assert setting == "name" or field.description, f"{choice.__name__}.{setting} has no description"


def _distance(one: Tensor, other: Tensor) -> float:
    """Returns the Kolmogorov-Smirnov distance of two samples of equal size; about 0.003 by chance here."""
    points = torch.linspace(0.001, 0.999, 999)
    below = [
        torch.searchsorted(values.float().sort().values, points) / len(values) for values in (one, other)
    ]
    return float((below[0] - below[1]).abs().max())
