"""The shape of each learning-rate schedule over a run."""

import math

import pytest

from halfbyte.trainer.optim.schedules import (
    SCHEDULES,
    Cooldown,
    Cosine,
    CosineRestarts,
    FallingSchedule,
    Linear,
    Polynomial,
)

STEPS = 100


def factors(schedule, steps=STEPS):
    return [schedule.factor(step, steps) for step in range(steps)]


@pytest.mark.parametrize("name", list(SCHEDULES.classes))
def test_every_schedule_warms_up_to_the_full_rate(name):
    warm = factors(SCHEDULES[name](name=name, warmup_steps=10), STEPS + 10)
    assert warm[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert warm[10:] == pytest.approx(factors(SCHEDULES[name](name=name)))
    assert warm[10] == 1.0


@pytest.mark.parametrize("name", list(SCHEDULES.classes))
def test_a_schedule_falls_if_it_declares_so(name):
    schedule = SCHEDULES[name](name=name)
    assert (factors(schedule)[-1] < 0.1) == schedule.falls


@pytest.mark.parametrize("name", [n for n, c in SCHEDULES.classes.items() if issubclass(c, FallingSchedule)])
def test_a_falling_schedule_ends_at_its_share(name):
    plain, raised = SCHEDULES[name](name=name), SCHEDULES[name](name=name, end=0.25)
    assert plain.after_warmup(1 - 1e-9) == pytest.approx(0, abs=1e-6)
    for step, factor in enumerate(factors(plain)):
        assert raised.factor(step, STEPS) == pytest.approx(0.25 + 0.75 * factor)


def test_the_shapes():
    assert factors(Linear(name="linear"))[25] == pytest.approx(0.75)
    assert factors(Cosine(name="cosine"))[25] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert factors(Polynomial(name="polynomial", power=3.0))[50] == pytest.approx(0.125)
    assert factors(Polynomial(name="polynomial", power=1.0)) == pytest.approx(factors(Linear(name="linear")))
    cooled = factors(Cooldown(name="cooldown", share=0.2))
    assert cooled[:80] == [1.0] * 80
    assert cooled[90] == pytest.approx(0.5)
    assert cooled[-1] == pytest.approx(0.05)


def test_restarts_repeat_the_wave():
    waves = factors(CosineRestarts(name="cosine_restarts", cycles=4))
    assert waves[25] == waves[50] == waves[75] == 1.0
    assert waves[:25] == pytest.approx(waves[75:])
    assert waves[:25] == pytest.approx(factors(Cosine(name="cosine"), 25))
    assert factors(CosineRestarts(name="cosine_restarts", cycles=1)) == factors(Cosine(name="cosine"))
