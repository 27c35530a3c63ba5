"""Recorded training steps without a GPU: the recorder runs the work again into the same memory.

Results must equal those of plain steps.
"""

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
from halfbyte.trainer.training import loop

from fake_recorders import Broken, Recorders
from recorded_steps import FAMILIES, Setup, batches, same
from runs import run_here, write_recipe
from small_recipe import SMALL, Write, problems
from steps import family_at


def trained(setup: Setup, optimizer: torch.optim.Optimizer, micro: list[Batch]) -> list[Tensor]:
    """Returns losses, gradients and weights of optimizer steps of two micro-batches each."""
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
def test_recorded_steps_equal_plain_steps(
    request: pytest.FixtureRequest, family_class: type[Family], fixture: str, keep: str
) -> None:
    """Two micro-batches per step, two sizes in turn, bf16 under autocast."""
    family = family_at(request.getfixturevalue(fixture), family_class)
    results, recorders = [], Recorders()
    for setup in (
        Setup(family, recorders=None, dtype=torch.bfloat16, keep=keep),
        Setup(family, recorders=recorders, dtype=torch.bfloat16, keep=keep),
    ):
        optimizer = torch.optim.AdamW(setup.parameters.values(), lr=1e-3)
        results.append(trained(setup, optimizer, batches(family, 6, (8, 12))))
    assert same(*results)
    # Of the 6 micro-batches, the first of each size ran eagerly; each of the others is a forward and a
    # backward.
    assert recorders.counts == (4, 8)
    assert setup.graphed.shapes == 2


@pytest.mark.parametrize("name", [*sorted(OPTIMIZERS.classes), "joined", "ema"])
def test_recordings_see_the_updates_of_every_optimizer(mini_flux: Path, name: str) -> None:
    """No optimizer or average moves the weights in memory, so the recordings stay valid."""
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


def test_gradients_do_not_share_memory_with_the_recording(mini_flux: Path) -> None:
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


def test_nothing_is_recorded_without_gradients_or_in_eval_mode(mini_flux: Path) -> None:
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


def test_a_forward_before_the_last_ones_backward_runs_eagerly(mini_flux: Path) -> None:
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
    # A forward without a backward ends when its output is dropped.
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
    with pytest.raises(RuntimeError, match=r"^train\.cuda_graphs: .*backward"):
        loss.backward()


def test_moving_or_freezing_parameters_records_again(mini_flux: Path) -> None:
    family, recorders = family_at(mini_flux, Flux), Recorders()
    setup, plain = Setup(family, recorders=recorders), Setup(family, recorders=None)
    (batch,) = batches(family, 1)
    for _ in range(2):
        setup.backward(batch)
    assert len(recorders.made) == 1
    for each in (setup, plain):
        for parameter in each.parameters.values():
            parameter.data = parameter.data * 1.5  # at another address
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
    """A model with one layer that the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, scale: float) -> tuple[Tensor]:
        return (self.used(x) * scale,)


def test_a_parameter_without_gradient_keeps_none() -> None:
    model = _Partly()
    graphed = GraphedDenoiser(model, recorder=Recorders())
    for _ in range(3):
        graphed(x=torch.ones(2, 3), scale=2.0)[0].sum().backward()
    assert graphed.shapes == 1
    assert model.unused.weight.grad is None
    assert torch.equal(model.used.bias.grad, torch.full((3,), 12.0))


def test_other_numbers_and_dtypes_need_other_recordings() -> None:
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


def test_inputs_that_require_gradients_are_not_recorded() -> None:
    recorders = Recorders()
    graphed = GraphedDenoiser(_Partly(), recorder=recorders)
    x = torch.ones(2, 3, requires_grad=True)
    for _ in range(3):
        graphed(x=x, scale=1.0)[0].sum().backward()
    assert x.grad is not None
    assert recorders.counts == (0, 0)


def test_the_number_of_recorded_shapes_is_limited(caplog: pytest.LogCaptureFixture) -> None:
    graphed = GraphedDenoiser(_Partly(), recorder=Recorders())
    with caplog.at_level(logging.INFO):
        for rows in range(1, MOST_SHAPES + 4):
            for _ in range(3):
                graphed(x=torch.ones(rows, 3), scale=1.0)[0].sum().backward()
    assert graphed.shapes == MOST_SHAPES
    (line,) = [record.message for record in caplog.records]
    assert line.startswith(f"train.cuda_graphs: {MOST_SHAPES} ")


@pytest.mark.parametrize("nth", [1, 2, 4])
def test_steps_that_cannot_be_recorded_run_eagerly_with_one_warning(
    mini_flux: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """The failure comes in the first forward, the first backward, or the backward of the second size."""
    monkeypatch.setattr(Broken, "nth", nth)
    family, recorders = family_at(mini_flux, Flux), Recorders(Broken)
    setup, plain = Setup(family, recorders=recorders), Setup(family, recorders=None)
    for batch in batches(family, 8, (8, 12)):
        assert torch.equal(setup.backward(batch), plain.backward(batch))
    assert same(setup.gradients(), plain.gradients())
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("train.cuda_graphs: ")
    # The first error's first line, not the second error, which only reports that the recording failed.
    assert line.endswith(": operation not permitted when stream is capturing")
    assert setup.graphed.shapes == 0
    assert recorders.counts[0] == nth - 1


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["train.stream_blocks=true"], "train.stream_blocks is true"),
        (["train.gradient_checkpointing=offload"], "train.gradient_checkpointing is offload"),
        (["train.fused_blocks=false"], "train.fused_blocks is false"),
        (["train.fused_adapters=false"], "train.fused_adapters is false"),
        (["lora.dora=true", "output.formats=[diffusers]"], "lora.dora is true"),
        (["lora.dropout=0.1"], "lora.dropout is not 0"),
        (["quant.type=int8"], "quant.type is int8"),
    ],
)
def test_settings_that_exclude_recording_are_refused(write: Write, overrides: list[str], reason: str) -> None:
    recipe = write(SMALL)
    load_recipe(recipe, overrides)
    (line,) = problems(recipe, "train.cuda_graphs=true", *overrides)
    assert "train.cuda_graphs" in line
    assert "got true, expected false" in line
    assert reason in line


def test_a_run_on_the_cpu_reports_that_nothing_is_recorded(mini_flux: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    world = read_world({"ACCELERATE_USE_CPU": "true"})
    settings = load_recipe(write_recipe(tmp_path, mini_flux), ["train.cuda_graphs=true", "train.steps=1"])
    assert run(settings, world, console=console, resume=False)
    (launches,) = [line for line in console.export_text().splitlines() if line.startswith("launches ")]
    assert "train.cuda_graphs" in launches
    assert "cpu" in launches
    assert "as CUDA graphs" not in launches


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "prodigy"])
def test_training_replays_the_recordings_of_the_warm_up(
    mini_flux: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    optimizer: str,
) -> None:
    """Also with optimizers that move the parameters into one buffer: recording starts only afterwards."""
    recorders = Recorders()
    monkeypatch.setattr(loop, "records_graphs", lambda recipe, world: True)
    monkeypatch.setattr(loop, "GraphedDenoiser", partial(GraphedDenoiser, recorder=recorders))
    run_here(
        write_recipe(tmp_path, mini_flux),
        "train.cuda_graphs=true",
        "train.steps=2",
        f"optimizer={{name: {optimizer}, lr: 1}}",
        "validation.held_out=1",
        "output.export_base=false",
    )
    recorded, replayed = recorders.counts
    assert recorded == 2  # forward and backward of the only size
    assert replayed >= 2 * 4
    assert "cuda_graphs" not in caplog.text
