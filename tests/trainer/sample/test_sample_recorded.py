"""Tests when `halfbyte sample` records CUDA graphs, and that images are the same with them."""

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
def test_which_placements_keep_the_transformer_on_its_device(placement: Placement, stays: bool) -> None:
    assert placement.stays == stays


@pytest.fixture(scope="module")
def run(mini_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter has a visible effect."""
    recipe = write_recipe(tmp_path_factory.mktemp("flux"), mini_flux, family="flux")
    made: Path = run_here(recipe, "sample.prompts=[a gradient, a red one]", "optimizer.lr=0.02")
    return made


def test_images_are_identical_with_and_without_recording(
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


def test_the_output_says_how_kernels_are_launched(run: Path) -> None:
    result = invoke(run, "--prompt", "a gradient")
    (line,) = [line for line in result.output.splitlines() if line.startswith("launches")]
    assert "--compile" in line


@pytest.mark.parametrize(
    ("changes", "quant", "placement", "fragment"),
    [
        ({}, "nf4", Placement(CUDA), None),
        ({}, None, Placement(CUDA), None),
        ({"compiled": False}, "nf4", Placement(CUDA), "no --compile"),
        ({}, "nf4", Placement(CPU), "cpu"),
        ({"offload": "model"}, "nf4", Placement(CUDA, "model"), "--offload model"),
        ({}, "int8", Placement(CUDA), "int8"),
    ],
)
def test_conditions_for_recording(
    changes: dict[str, Any], quant: str | None, placement: Placement, fragment: str | None
) -> None:
    request = SampleRequest("somewhere", **{"compiled": True, **changes})
    recipe = None if quant is None else QuantRecipe(quant)
    subject: Any = SimpleNamespace(quant=recipe)
    reason = sample_run._why_one_by_one(request, subject, placement)
    if fragment is None:
        assert reason is None
    else:
        assert reason is not None
        assert fragment in reason
