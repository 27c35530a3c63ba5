"""Optimizers over joined parameters take the same steps as the library's, and detect what they cannot join."""

import pytest
import torch
from prodigyopt import Prodigy as ProdigyOptimizer

from halfbyte.trainer.optim.optimizers import Adafactor, Prodigy
from halfbyte.trainer.run_folder import checkpoint

SHAPES = [(4, 48), (40, 4), (4, 48), (24,), (6, 50), (24,)]


def parameters(shapes=SHAPES):
    named = []
    for index, shape in enumerate(shapes):
        draws = torch.Generator().manual_seed(index)
        start = torch.zeros(shape) if index == 1 else torch.randn(shape, generator=draws) / 2
        named.append((f"layer{index}", torch.nn.Parameter(start)))
    return named


def give_gradients(named, step, without=()):
    for index, (_, parameter) in enumerate(named):
        draws = torch.Generator().manual_seed(100 * step + index)
        gradient = torch.randn(parameter.shape, generator=draws) + parameter.detach()
        parameter.grad = None if index in without else gradient


def walk(named, optimizer, steps=4, **options):
    for step in range(steps):
        give_gradients(named, step, **options)
        optimizer.step()
    return [parameter.detach().clone() for _, parameter in named]


def assert_close(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("slice_p", [1, 5])
def test_prodigy_takes_the_librarys_steps(slice_p):
    ours, theirs = parameters(), parameters()
    choice = Prodigy(name="prodigy", d0=1e-3, slice_p=slice_p)
    library = ProdigyOptimizer(
        theirs,
        lr=1.0,
        weight_decay=0.01,
        use_bias_correction=True,
        safeguard_warmup=True,
        d0=1e-3,
        slice_p=slice_p,
    )
    one, other = walk(ours, choice.build(ours)), walk(theirs, library)
    if slice_p == 1:
        assert_close(one, other)
    else:  # ours takes every fifth value of the joined tensor, the library every fifth of each parameter
        assert all(torch.allclose(x, y, atol=0.3) for x, y in zip(one, other, strict=True))


def test_adafactor_takes_the_librarys_steps_if_all_shapes_differ():
    shapes = [(4, 48), (40, 4), (24,), (6, 50)]
    ours, theirs = parameters(shapes), parameters(shapes)
    choice = Adafactor(name="adafactor", lr=1e-2)
    library = torch.optim.Adafactor(theirs, lr=1e-2, eps=(None, 1.0), weight_decay=0.01)
    assert_close(walk(ours, choice.build(ours)), walk(theirs, library))


def test_a_stack_keeps_rows_and_columns_of_each_matrix():
    """Without clipping, stacked matrices take the same steps as separate ones; vectors have no rows and
    columns."""
    ours, theirs = parameters(), parameters()
    choice = Adafactor(name="adafactor", lr=1e-2, clip=100.0)
    library = torch.optim.Adafactor(theirs, lr=1e-2, eps=(None, 1.0), d=100.0, weight_decay=0.01)
    assert_close(walk(ours, choice.build(ours)), walk(theirs, library))


@pytest.mark.parametrize("choice", [Adafactor(name="adafactor", lr=1e-2), Prodigy(name="prodigy", d0=1e-3)])
def test_joining_changes_no_value_and_a_missing_gradient_is_zero(choice):
    before, joined = parameters(), parameters()
    choice.build(joined)
    assert all(one.equal(other) for (_, one), (_, other) in zip(before, joined, strict=True))
    missing, zero = parameters(), parameters()
    zeroed = choice.build(zero)
    for step in range(3):
        give_gradients(zero, step)
        zero[2][1].grad.zero_()
        zeroed.step()
    assert_close(
        walk(missing, choice.build(missing), 3, without=(2,)), [parameter.detach() for _, parameter in zero]
    )


def test_parameters_in_another_order_are_refused():
    named = parameters()
    optimizer = Prodigy(name="prodigy").build(named)
    give_gradients(named, 0)
    optimizer.step()
    saved = checkpoint.named_optimizer_state(optimizer)
    reordered = parameters()[::-1]
    with pytest.raises(ValueError, match="order"):
        checkpoint.restore_optimizer(Prodigy(name="prodigy").build(reordered), saved)


def test_a_parameter_whose_data_was_replaced_is_detected():
    named = parameters()
    optimizer = Prodigy(name="prodigy").build(named)
    give_gradients(named, 0)
    named[0][1].data = named[0][1].data.clone()
    with pytest.raises(AssertionError, match="joined"):
        optimizer.step()
