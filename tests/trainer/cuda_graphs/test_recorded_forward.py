"""Recorded forwards without a GPU: the recorder repeats operations; images must not change."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from torch._dynamo.utils import counters

from halfbyte.trainer.cuda_graphs.forward import MOST_FORWARDS, RecordedForwards, recorded_forwards
from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.families.sd3.family import SD3
from halfbyte.trainer.runtime.placement import Placement
from halfbyte.trainer.sample.draw import compile_blocks
from halfbyte.trainer.sample.sampler import PictureSettings, PipelineCall
from halfbyte.trainer.sample.strength import AdapterStrength

from fake_recorders import Broken, Recorders, Tape, Wrong
from probe import inputs
from steps import adapted, family_at, text_of

CPU = torch.device("cpu")
FAMILIES = pytest.mark.parametrize(("family_class", "fixture"), [(Flux, "mini_flux"), (SD3, "mini_sd3")])


@pytest.fixture(scope="module")
def flux(mini_flux: Path) -> Family:
    return family_at(mini_flux, Flux)


@pytest.fixture
def denoiser(flux: Family) -> nn.Module:
    return denoiser_of(flux)


def denoiser_of(family: Family) -> nn.Module:
    return adapted(family, dtype=torch.float32, settings=BlockSettings("inputs")).eval()


def call_of(family: Family, denoiser: nn.Module, *, steps: int = 3) -> PipelineCall:
    pipeline: Any = family.pipeline_class.from_pretrained(
        family.source.folder, transformer=denoiser, **dict.fromkeys(family.text_components)
    )
    pipeline.set_progress_bar_config(disable=True)
    settings = PictureSettings(steps, 3.5, 64, 64)
    return PipelineCall(family, pipeline, text_of(family, 0), settings, CPU, torch.float32)


def forward(denoiser: nn.Module, **changes: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = denoiser(**inputs(denoiser, torch.float32) | changes)[0]
    return output


@FAMILIES
def test_images_equal_those_of_plain_sampling_at_every_strength(
    request: pytest.FixtureRequest, family_class: type[Family], fixture: str
) -> None:
    """Uses the stock pipelines, SD3's with classifier-free guidance; changes strengths back and forth."""
    family = family_at(request.getfixturevalue(fixture), family_class)
    recorders = Recorders(Tape)
    denoiser = denoiser_of(family)
    strength, call = AdapterStrength(denoiser), call_of(family, denoiser)

    def drawn(value: float, seed: int) -> numpy.ndarray:
        strength.set(value)
        return numpy.asarray(call.draw(text_of(family, seed), seed))

    jobs = [(1.0, 1), (1.0, 2), (0.5, 1), (0.0, 1), (0.0, 2), (0.5, 2), (1.0, 1)]
    plain = [drawn(*job) for job in jobs]
    with recorded_forwards(denoiser, recorders) as forwards:
        recorded = [drawn(*job) for job in jobs]
        assert forwards.shapes == 1
    assert all(numpy.array_equal(one, other) for one, other in zip(recorded, plain, strict=True))
    assert len({picture.tobytes() for picture in plain}) == 6
    # Of 21 forwards, 3 ran only eagerly: adapters on, off and on again. Each of the 3 recorded ones was
    # replayed twice.
    assert recorders.counts == (3, 21)


def test_in_place_changes_of_adapters_are_seen_and_other_changes_record_again(
    flux: Family, denoiser: Any
) -> None:
    recorders = Recorders(Tape)
    plain = denoiser_of(flux)
    strengths = [AdapterStrength(each) for each in (denoiser, plain)]
    with recorded_forwards(denoiser, recorders):
        for value, recorded in [(1, 1), (0.5, 1), (0, 2), (1, 3)]:
            for strength in strengths:
                strength.set(value)
            for _ in range(2):
                assert torch.equal(forward(denoiser), forward(plain)), value
            assert recorders.counts[0] == recorded
        # diffusers scales adapters by a Python number, which a recording contains as a constant.
        for each in (denoiser, plain):
            each.set_adapters(["default"], [0.25])
        for _ in range(2):
            assert torch.equal(forward(denoiser), forward(plain))
        assert recorders.counts[0] == 4


def test_a_replay_reads_new_inputs_and_leaves_earlier_outputs_unchanged(denoiser: nn.Module) -> None:
    given = [{"timestep": torch.tensor([at]), "guidance": torch.tensor([1 + at])} for at in (0.9, 0.5, 0.1)]
    expected = [forward(denoiser, **one) for one in given]
    recorders = Recorders(Tape)
    with recorded_forwards(denoiser, recorders) as forwards:
        forward(denoiser)
        found = [forward(denoiser, **one) for one in given]
        assert forwards.shapes == 1
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert recorders.counts == (1, 4)


def test_each_shape_has_its_recording_and_the_least_recently_used_is_dropped() -> None:
    model, recorders = _Scaled(), Recorders(Tape)
    with recorded_forwards(model, recorders) as forwards:
        for rows in range(1, MOST_FORWARDS + 1):
            for _ in range(2):
                scaled(model, rows)
        assert (forwards.shapes, recorders.counts) == (MOST_FORWARDS, (MOST_FORWARDS, 2 * MOST_FORWARDS))
        scaled(model, 1)
        for _ in range(2):
            scaled(model, MOST_FORWARDS + 1)
        assert (forwards.shapes, recorders.counts[0]) == (MOST_FORWARDS, MOST_FORWARDS + 1)
        scaled(model, 1)
        assert recorders.counts[0] == MOST_FORWARDS + 1, "it was used recently"
        scaled(model, 2)
        assert recorders.counts[0] == MOST_FORWARDS + 2
    assert len(recorders.made) == 1, "all recordings share one memory pool"


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(
        self, x: Tensor, scale: float = 1.0, settings: Any = None, *, return_dict: bool = True
    ) -> Any:
        output = self.linear(x) * scale
        return {"sample": output} if return_dict else (output,)


def scaled(model: _Scaled, rows: int, **changes: Any) -> None:
    """Runs the model and checks its output."""
    x = torch.randn(rows, 3)
    given = {"x": x, "return_dict": False, **changes}
    with torch.no_grad():
        (output,) = model(**given)
        assert torch.equal(output, model.linear(x) * given.get("scale", 1.0))


def test_numbers_and_settings_are_part_of_the_key() -> None:
    model, recorders = _Scaled(), Recorders(Tape)
    with recorded_forwards(model, recorders) as forwards:
        for changes in ({"scale": 2.0}, {"scale": 3.0}, {"settings": {}}, {"settings": None}):
            for _ in range(2):
                scaled(model, 2, **changes)
        assert forwards.shapes == 4


@pytest.mark.parametrize(
    "changes",
    [{"settings": {"scale": 1}}, {"settings": [1]}, {"settings": torch.empty(1, device="meta")}],
)
def test_inputs_that_cannot_be_held_are_not_recorded(changes: dict[str, Any]) -> None:
    model, recorders = _Scaled(), Recorders(Tape)
    with recorded_forwards(model, recorders):
        for _ in range(3):
            scaled(model, 2, **changes)
    assert recorders.made == []


def test_other_calls_run_eagerly() -> None:
    """Positional arguments, a dictionary as output, gradients, inference mode, and autocast."""
    model, recorders, x = _Scaled(), Recorders(Tape), torch.ones(2, 3)
    with recorded_forwards(model, recorders):
        for _ in range(3):
            with torch.no_grad():
                model(x, return_dict=False)
                assert model(x=x).keys() == {"sample"}
            model(x=x, return_dict=False)[0].sum().backward()
            with torch.inference_mode():
                model(x=x, return_dict=False)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                assert model(x=x, return_dict=False)[0].dtype == torch.bfloat16
    assert model.linear.bias.grad is not None
    assert recorders.made == []


def test_moved_weights_are_recorded_again(denoiser: Any) -> None:
    recorders = Recorders(Tape)
    with recorded_forwards(denoiser, recorders):
        for _ in range(2):
            forward(denoiser)
        denoiser.norm_out.linear.bias.data = denoiser.norm_out.linear.bias.data + 1.0
        found = [forward(denoiser) for _ in range(2)]
    assert all(torch.equal(one, forward(denoiser)) for one in found)
    assert (len(recorders.made), recorders.counts) == (2, (2, 4))


def test_the_denoiser_is_restored_afterwards(denoiser: Any) -> None:
    before, own = forward(denoiser), vars(denoiser).keys() - {"_diffusers_hook"}
    config, dtype = denoiser.config, denoiser.dtype

    def interrupted() -> Iterator[RecordedForwards]:
        with recorded_forwards(denoiser, Recorders(Tape)) as forwards:
            assert (denoiser.config, denoiser.dtype) == (config, dtype)
            with denoiser.cache_context("cond"):
                for _ in range(2):
                    forward(denoiser)
            assert forwards.shapes == 1
            yield forwards
            raise KeyboardInterrupt

    drawing = interrupted()
    forwards = next(drawing)
    with pytest.raises(KeyboardInterrupt):
        next(drawing)
    assert forwards.shapes == 0
    assert vars(denoiser).keys() - {"_diffusers_hook"} == own
    assert torch.equal(forward(denoiser), before)


@FAMILIES
def test_nothing_is_compiled_while_it_is_recorded(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    family_class: type[Family],
    fixture: str,
) -> None:
    """Compiling would break a CUDA graph, so the first, eager call must compile everything."""

    def compile_block(block: Any, fullgraph: bool) -> None:
        compiled = torch.compile(block._call_impl, backend="aot_eager", fullgraph=fullgraph)
        block._compiled_call_impl = compiled

    monkeypatch.setattr(nn.Module, "compile", compile_block)
    torch._dynamo.reset()
    family = family_at(request.getfixturevalue(fixture), family_class)
    denoiser = denoiser_of(family)
    compile_blocks(denoiser, family)
    found: list[int] = []
    recorders = Recorders()
    with recorded_forwards(denoiser, recorders):
        call_of(family, denoiser).draw(
            text_of(family, 1), 1, on_step=lambda _: found.append(counters["stats"]["unique_graphs"])
        )
    torch._dynamo.reset()
    assert recorders.counts == (1, 3)
    assert found[0] > 0
    assert found == [found[0]] * 3


def test_a_recording_with_a_different_output_is_not_used(
    denoiser: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    expected = forward(denoiser)
    with recorded_forwards(denoiser, Recorders(Wrong)) as forwards:
        assert all(torch.equal(forward(denoiser), expected) for _ in range(3))
        assert forwards.shapes == 0
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("--compile: ")
    assert "5.0%" in line


@pytest.mark.parametrize("nth", [1, 2])
def test_forwards_that_cannot_be_recorded_run_eagerly_with_one_warning(
    flux: Family,
    denoiser: nn.Module,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    nth: int,
) -> None:
    """The failure comes at the first size, or at the second, after one was recorded."""
    monkeypatch.setattr(Broken, "nth", nth)
    recorders = Recorders(Broken)
    call = call_of(flux, denoiser)
    wide = replace(call, settings=replace(call.settings, width=96))
    plain = [numpy.asarray(each.draw(text_of(flux, 1), 1)) for each in (call, wide, call)]
    with caplog.at_level(logging.INFO), recorded_forwards(denoiser, recorders) as forwards:
        for each, expected in zip((call, wide, call), plain, strict=True):
            assert numpy.array_equal(each.draw(text_of(flux, 1), 1), expected)
        assert forwards.shapes == 0
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("--compile: ")
    assert line.endswith(": operation not permitted when stream is capturing")
    assert recorders.counts[0] == nth - 1


def test_a_forward_that_waits_for_a_number_cannot_be_recorded(
    denoiser: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, whole = forward(denoiser), type(denoiser.norm_out).forward

    def waits(self: Any, x: Tensor, temb: Tensor) -> Tensor:
        x.sum().item()
        output: Tensor = whole(self, x, temb)
        return output

    monkeypatch.setattr(type(denoiser.norm_out), "forward", waits)
    with recorded_forwards(denoiser, Recorders(Tape)):
        for _ in range(3):
            assert torch.equal(forward(denoiser), expected)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("placement", [Placement(CPU, "model"), Placement(CPU, "sequential")])
def test_an_offloaded_denoiser_is_not_recorded(flux: Family, placement: Placement) -> None:
    denoiser, recorders = denoiser_of(flux), Recorders(Tape)
    call, reference = call_of(flux, denoiser), call_of(flux, denoiser_of(flux))
    placement.place(call.pipeline)
    with recorded_forwards(denoiser, recorders):
        picture = call.draw(text_of(flux, 1), 1, output_type="latent")
    assert recorders.made == []
    expected = reference.draw(text_of(flux, 1), 1, output_type="latent")
    assert (picture - expected).norm() < 1e-4 * expected.norm()
    assert "forward" in vars(denoiser), "accelerate's own forward is back"


def test_a_denoiser_with_accelerates_hooks_is_not_recorded(denoiser: nn.Module) -> None:
    recorders = Recorders(Tape)
    expected = forward(denoiser)
    add_hook_to_module(denoiser, ModelHook())
    with recorded_forwards(denoiser, recorders):
        for _ in range(3):
            assert torch.equal(forward(denoiser), expected)
    assert recorders.made == []
