"""When `halfbyte sample` records what it draws with, and that it draws the same."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.trainer.runtime.placement import Placement
from halfbyte.trainer.sample import run as sample_run
from halfbyte.trainer.sample.request import SampleRequest

from fake_recorders import Recorders, Tape
from runs import run_here, write_recipe
from sample_calls import drawn_pixels, invoke

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.mark.parametrize(
    ("placement", "stays"),
    [
        (Placement(CPU), True),
        (Placement(CPU, "model"), False),
        (Placement(CPU, "sequential"), False),
        (Placement(CPU, device_map="auto"), False),
    ],
)
def test_who_stays(placement: Placement, stays: bool) -> None:
    assert placement.stays == stays


@pytest.fixture(scope="module")
def run(mini_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter does something that is seen."""
    recipe = write_recipe(tmp_path_factory.mktemp("flux"), mini_flux, family="flux")
    made: Path = run_here(recipe, "sample.prompts=[a gradient, a red one]", "optimizer.lr=0.02")
    return made


def test_sample_draws_with_recordings_what_it_draws_without(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorders, strengths = Recorders(Tape), ("--strength", "0.5,0,1")
    plain = drawn_pixels(tmp_path / "plain", run, *strengths)
    with monkeypatch.context() as patched:
        patched.setattr(sample_run, "_why_one_by_one", lambda *arguments: None)
        patched.setattr(sample_run, "CudaRecorder", recorders)
        recorded = drawn_pixels(tmp_path / "recorded", run, *strengths)
    assert recorders.counts[0] == 3
    assert plain.keys() == recorded.keys()
    assert all(numpy.array_equal(recorded[name], plain[name]) for name in plain)


def test_sample_says_how_it_launches(run: Path) -> None:
    result = invoke(run, "--prompt", "a gradient")
    assert "launches   kernel by kernel (no --compile)" in result.output


@pytest.mark.parametrize(
    ("changes", "quant", "placement", "said"),
    [
        ({}, "nf4", Placement(CUDA), None),
        ({}, None, Placement(CUDA), None),
        ({"compiled": False}, "nf4", Placement(CUDA), "no --compile"),
        ({}, "nf4", Placement(CPU), "nothing is recorded on cpu"),
        ({"offload": "model"}, "nf4", Placement(CUDA, "model"), "--offload model moves the transformer"),
        ({}, "int8", Placement(CUDA), "int8 waits in every layer"),
    ],
)
def test_when_sample_records(
    changes: dict[str, Any], quant: str | None, placement: Placement, said: str | None
) -> None:
    request = SampleRequest("somewhere", **{"compiled": True, **changes})
    recipe = None if quant is None else QuantRecipe(quant)
    subject: Any = SimpleNamespace(quant=recipe)
    why = sample_run._why_one_by_one(request, subject, placement)
    assert why is None if said is None else said in why
