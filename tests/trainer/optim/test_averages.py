"""The moving average of the adapter: its formula, and swapping it in and out of the model."""

import pytest
import torch

from halfbyte.trainer.optim.averages import Ema, TrainedWeights


def parameters(count=2):
    draws = torch.Generator().manual_seed(0)
    return {f"layer{i}": torch.nn.Parameter(torch.randn(4, 3, generator=draws)) for i in range(count)}


def walk(trained, step):
    for number, parameter in enumerate(trained.values()):
        parameter.data.fill_(step + 0.1 * number)


def test_the_average_follows_its_formula():
    trained = parameters()
    ema = Ema(trained, decay=0.5, warmup=False)
    expected = trained["layer0"].detach().double()
    for step in range(1, 6):
        walk(trained, step)
        ema.update(step)
        expected = 0.5 * expected + 0.5 * step
    assert torch.allclose(ema.average["layer0"].double(), expected, atol=1e-6)


def test_the_warmup_starts_with_a_low_decay():
    kept = []
    for step in (1, 10, 1000):
        trained = parameters()
        ema = Ema(trained, decay=0.99)
        before = ema.average["layer0"].clone()
        walk(trained, 0)
        ema.update(step)
        kept.append(float((ema.average["layer0"] / before).mean()))
    assert kept == pytest.approx([2 / 11, 11 / 20, 0.99], rel=1e-5)


def test_updating_every_third_step_averages_over_the_same_span():
    each, third = parameters(), parameters()
    one, other = Ema(each, decay=0.9, warmup=False), Ema(third, decay=0.9, every=3, warmup=False)
    for step in range(1, 7):
        for trained, ema in ((each, one), (third, other)):
            walk(trained, 1)  # constant weights: both averages approach them equally
            ema.update(step)
    assert torch.allclose(one.average["layer0"], other.average["layer0"], atol=1e-6)
    before = other.average["layer0"].clone()
    other.update(7)
    assert torch.equal(other.average["layer0"], before)


def test_swapping_in_restores_the_trained_weights_bitwise():
    trained = parameters()
    ema = Ema(trained, decay=0.9)
    walk(trained, 1 / 3)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}

    def fail_inside():
        with ema.swapped_in():
            assert all(parameter.equal(ema.average[name]) for name, parameter in trained.items())
            assert not trained["layer0"].equal(before["layer0"])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert all(parameter.equal(before[name]) for name, parameter in trained.items())
    assert all(parameter.requires_grad for parameter in trained.values())


def test_the_average_of_a_bf16_adapter_is_fp32():
    trained = {name: torch.nn.Parameter(value.data.bfloat16()) for name, value in parameters().items()}
    ema = Ema(trained, decay=0.999, warmup=False)
    walk(trained, 1)
    ema.update(1)
    assert {value.dtype for value in ema.average.values()} == {torch.float32}
    assert not ema.average["layer0"].equal(trained["layer0"].float())


def test_an_average_of_other_parameters_is_refused():
    ema = Ema(parameters(), decay=0.9)
    ema.restore({name: torch.ones(4, 3) for name in ema.average})
    assert float(ema.average["layer1"].mean()) == 1
    with pytest.raises(ValueError, match="parameters"):
        ema.restore({"layer0": torch.ones(4, 3)})


def test_without_an_average_the_trained_weights_are_used():
    weights = TrainedWeights()
    assert not weights.averaged
    with weights.swapped_in():
        pass
