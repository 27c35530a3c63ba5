"""Recorded steps without a GPU: what is recorded is run again, into the same memory, and must be the plain step."""

import gc
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from halfbyte.trainer.cuda_graphs.denoiser import MOST_SHAPES, GraphedDenoiser
from halfbyte.trainer.data.batches import Batch
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.optim.averages import Ema, OptimizerAverage
from halfbyte.trainer.optim.joined import JoinedOptimizer, all_in_one
from halfbyte.trainer.optim.optimizers import OPTIMIZERS
from halfbyte.trainer.recipe.load import load_recipe
from halfbyte.trainer.run import run
from halfbyte.trainer.runtime.world import read_world
from halfbyte.trainer.training import loop as fit

from fake_recorders import Broken, Recorders
from recorded_steps import FAMILIES, Setup, batches, same
from runs import run_here, write_recipe
from small_recipe import SMALL, Write, problems
from steps import family_at


def trained(setup: Setup, optimizer: torch.optim.Optimizer, micro: list[Batch]) -> list[Tensor]:
    """Losses, gradients and weights of optimizer steps of two micro-batches each."""
    found = []
    for number, batch in enumerate(micro):
        found.append(setup.backward(batch))
        if number % 2:
            found += setup.gradients()
            optimizer.step()
            optimizer.zero_grad()
    return found + [p.detach().clone() for p in setup.parameters.values()]


@FAMILIES
@pytest.mark.parametrize("keep", ["inputs", "attention", "everything"])
def test_recorded_steps_are_the_plain_ones(
    request: pytest.FixtureRequest, family_class: type[Family], fixture: str, keep: str
) -> None:
    """Two micro-batches a step, two sizes in turn, bf16 under autocast."""
    family = family_at(request.getfixturevalue(fixture), family_class)
    results, recorders = [], Recorders()
    for setup in (
        Setup(family, recorders=None, dtype=torch.bfloat16, keep=keep),
        Setup(family, recorders=recorders, dtype=torch.bfloat16, keep=keep),
    ):
        optimizer = torch.optim.AdamW(setup.parameters.values(), lr=1e-3)
        results.append(trained(setup, optimizer, batches(family, 8, (8, 12))))
    assert same(*results)
    # Of the eight, the first of each size ran as ever; the others are a forward and a backward.
    assert recorders.counts == (4, 12)
    assert setup.graphed.shapes == 2


@pytest.mark.parametrize("name", [*sorted(OPTIMIZERS.classes), "joined", "ema"])
def test_every_optimizer_moves_what_was_recorded(mini_flux: Path, name: str) -> None:
    """No optimizer or average puts weights elsewhere between steps, and recordings see what it makes of them."""
    family, results, recorders = family_at(mini_flux, Flux), [], Recorders()
    for setup in (Setup(family, recorders=None), Setup(family, recorders=recorders)):
        named = list(setup.parameters.items())
        if name == "joined":
            optimizer: torch.optim.Optimizer = JoinedOptimizer(
                named, all_in_one, lambda joined: torch.optim.AdamW(joined, lr=1e-3)
            )
        elif name == "ema":
            optimizer = torch.optim.AdamW(setup.parameters.values(), lr=1e-3)
        else:
            optimizer = OPTIMIZERS[name].model_validate({"name": name}).build(named)
        average = None
        if name == "ema":
            average = Ema(setup.parameters, decay=0.5)
        elif name == "schedule_free_adamw":
            average = OptimizerAverage(setup.parameters, optimizer)
        found = []
        for number, batch in enumerate(batches(family, 4)):
            found.append(setup.backward(batch))
            optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                average.update(number + 1)
                with average.swapped_in(), torch.no_grad():
                    found.append(setup.module.loss(batch))
        results.append(found + [p.detach().clone() for p in setup.parameters.values()])
    assert same(*results)
    assert recorders.counts == (2, 6)
    assert len(recorders.made) == 1


def test_gradients_are_not_the_recordings_own_memory(mini_flux: Path) -> None:
    family = family_at(mini_flux, Flux)
    setup = Setup(family, recorders=Recorders())
    first, second, third = batches(family, 3)
    setup.backward(first)
    setup.module.zero_grad()
    setup.backward(second)
    kept, values = [p.grad for p in setup.parameters.values()], setup.gradients()
    setup.module.zero_grad()
    setup.backward(third)
    assert same([grad for grad in kept if grad is not None], values)
    assert not same(setup.gradients(), values)


def test_without_gradients_or_out_of_training_nothing_is_recorded(mini_flux: Path) -> None:
    family, recorders = family_at(mini_flux, Flux), Recorders()
    setup = Setup(family, recorders=recorders)
    (batch,) = batches(family, 1)
    with torch.no_grad():
        for _ in range(3):
            expected = setup.module.loss(batch)
    setup.denoiser.eval()
    for _ in range(3):
        setup.backward(batch)
    assert recorders.counts == (0, 0)
    setup.denoiser.train()
    for _ in range(3):
        assert torch.equal(setup.backward(batch), expected)
    assert recorders.counts == (2, 4)
    with torch.no_grad():
        assert torch.equal(setup.module.loss(batch), expected)
    assert recorders.counts == (2, 4)


def test_a_forward_ahead_of_anothers_backward_runs_as_ever(mini_flux: Path) -> None:
    family, recorders = family_at(mini_flux, Flux), Recorders()
    setup, plain = Setup(family, recorders=recorders), Setup(family, recorders=None)
    first, second = batches(family, 2, (8, 12))
    for batch in (first, second, first, second):
        setup.backward(batch)
    assert setup.graphed.shapes == 2
    for each in (setup, plain):
        each.module.zero_grad()
        losses = [each.module.loss(first), each.module.loss(second), each.module.loss(first)]
        for loss in losses:
            loss.backward()
    before = recorders.counts[1]
    assert same(setup.gradients(), plain.gradients())
    # A forward that nobody goes back from is over with its output.
    loss = setup.module.loss(first)
    assert recorders.counts[1] == before + 1
    del loss
    gc.collect()
    setup.backward(first)
    assert recorders.counts[1] == before + 3


def test_a_second_backward_is_an_error(mini_flux: Path) -> None:
    family = family_at(mini_flux, Flux)
    setup = Setup(family, recorders=Recorders())
    (batch,) = batches(family, 1)
    setup.backward(batch)
    loss = setup.module.loss(batch)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"train\.cuda_graphs: .* only once"):
        loss.backward()


def test_moved_or_frozen_parameters_are_recorded_anew(mini_flux: Path) -> None:
    family, recorders = family_at(mini_flux, Flux), Recorders()
    setup, plain = Setup(family, recorders=recorders), Setup(family, recorders=None)
    (batch,) = batches(family, 1)
    for _ in range(2):
        setup.backward(batch)
    assert len(recorders.made) == 1
    for each in (setup, plain):
        for parameter in each.parameters.values():
            parameter.data = parameter.data * 1.5  # elsewhere
        each.module.zero_grad()
        each.backward(batch)
    assert len(recorders.made) == 2
    assert same(setup.gradients(), plain.gradients())
    for each in (setup, plain):
        next(iter(each.parameters.values())).requires_grad_(False)
        each.module.zero_grad()
        each.backward(batch)
    assert len(recorders.made) == 3
    assert same(setup.gradients(), plain.gradients())


class _Partly(nn.Module):
    """Has a parameter that gives nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, scale: float) -> tuple[Tensor]:
        return (self.used(x) * scale,)


def test_a_parameter_without_gradient_has_none() -> None:
    model = _Partly()
    graphed = GraphedDenoiser(model, recorder=Recorders())
    for _ in range(3):
        graphed(x=torch.ones(2, 3), scale=2.0)[0].sum().backward()
    assert graphed.shapes == 1
    assert model.unused.weight.grad is None
    assert torch.equal(model.used.bias.grad, torch.full((3,), 12.0))


def test_other_numbers_and_types_are_other_recordings() -> None:
    model, recorders = _Partly(), Recorders()
    graphed = GraphedDenoiser(model, recorder=recorders)
    for scale in (1.0, 2.0):
        for autocast in (False, True):
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    (output,) = graphed(x=torch.ones(2, 3), scale=scale)
                output.sum().backward()
                assert output.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert graphed.shapes == 4


def test_inputs_that_want_gradients_are_not_recorded() -> None:
    recorders = Recorders()
    graphed = GraphedDenoiser(_Partly(), recorder=recorders)
    x = torch.ones(2, 3, requires_grad=True)
    for _ in range(3):
        graphed(x=x, scale=1.0)[0].sum().backward()
    assert x.grad is not None
    assert recorders.counts == (0, 0)


def test_there_is_an_end_to_shapes(caplog: pytest.LogCaptureFixture) -> None:
    graphed = GraphedDenoiser(_Partly(), recorder=Recorders())
    with caplog.at_level(logging.INFO):
        for rows in range(1, MOST_SHAPES + 4):
            for _ in range(3):
                graphed(x=torch.ones(rows, 3), scale=1.0)[0].sum().backward()
    assert graphed.shapes == MOST_SHAPES
    assert [record.message for record in caplog.records] == [
        f"train.cuda_graphs: {MOST_SHAPES} sizes are recorded; others run kernel by kernel"
    ]


@pytest.mark.parametrize("nth", [1, 2, 4])
def test_what_cannot_be_recorded_runs_as_ever_and_says_so_once(
    mini_flux: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """At the first forward, at the first backward, at the backward of the second size."""
    monkeypatch.setattr(Broken, "nth", nth)
    family, recorders = family_at(mini_flux, Flux), Recorders(Broken)
    setup, plain = Setup(family, recorders=recorders), Setup(family, recorders=None)
    for batch in batches(family, 8, (8, 12)):
        assert torch.equal(setup.backward(batch), plain.backward(batch))
    assert same(setup.gradients(), plain.gradients())
    assert [record.message for record in caplog.records] == [
        "train.cuda_graphs: steps run kernel by kernel, for recording failed: operation not permitted when stream is"
        " capturing"
    ]
    assert setup.graphed.shapes == 0
    assert recorders.counts[0] == nth - 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.stream_blocks=true"], "where train.stream_blocks is true"),
        (["train.gradient_checkpointing=offload"], "where train.gradient_checkpointing is offload"),
        (["train.fused_blocks=false"], "where train.fused_blocks is false"),
        (["train.fused_adapters=false"], "where train.fused_adapters is false"),
        (["lora.dora=true", "output.formats=[diffusers]"], "where lora.dora is true: "),
        (["lora.dropout=0.1"], "where lora.dropout is not 0: "),
        (["quant.type=int8"], "where quant.type is int8: "),
    ],
)
def test_what_is_not_recorded_is_refused(write: Write, overrides: list[str], said: str) -> None:
    recipe = write(SMALL)
    load_recipe(recipe, overrides)
    (line,) = problems(recipe, "train.cuda_graphs=true", *overrides)
    assert "train.cuda_graphs" in line
    assert f"got true, expected false {said}" in line


def test_on_the_cpu_a_run_says_that_nothing_is_recorded(mini_flux: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    world = read_world({"ACCELERATE_USE_CPU": "true"})
    settings = load_recipe(write_recipe(tmp_path, mini_flux), ["train.cuda_graphs=true", "train.steps=1"])
    assert run(settings, world, console=console, resume=False)
    assert (
        "launches    operation by operation: train.cuda_graphs means nothing on cpu" in console.export_text()
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "prodigy"])
def test_what_was_compared_ahead_of_training_is_what_trains(
    mini_flux: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    optimizer: str,
) -> None:
    """Also with optimizers that move the parameters together: one recording of a size, made when all lie in place."""
    recorders = Recorders()
    monkeypatch.setattr(fit, "records_graphs", lambda recipe, world: True)
    monkeypatch.setattr(fit, "GraphedDenoiser", partial(GraphedDenoiser, recorder=recorders))
    run_here(
        write_recipe(tmp_path, mini_flux),
        "train.cuda_graphs=true",
        "train.steps=2",
        f"optimizer={{name: {optimizer}, lr: 1}}",
        "validation.held_out=1",
        "output.export_base=false",
    )
    recorded, replayed = recorders.counts
    assert recorded == 2  # the one size's forward and backward
    assert replayed >= 2 * 4
    assert "cuda_graphs" not in caplog.text
