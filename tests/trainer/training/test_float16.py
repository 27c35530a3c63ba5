"""Training in float16: a step whose gradients overflow is skipped and does not end the run."""

import contextlib
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision

from halfbyte.trainer.errors import HalfbyteError
from halfbyte.trainer.training import loop as fit
from halfbyte.trainer.training.metrics import read_metrics

from runs import run_here, write_recipe


class Scaled(MixedPrecision):
    """Lightning's plugin without autocast: its scaler works on the CPU, but autocast to float16 does not."""

    def forward_context(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()


def scaled(monkeypatch: pytest.MonkeyPatch, init_scale: float) -> None:
    def trainer(precision: str, **settings: object) -> Trainer:
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        return Trainer(plugins=[Scaled("16-mixed", "cpu", scaler)], **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(fit, "Trainer", trainer)


def test_a_scale_that_is_too_high_skips_steps_without_ending_the_run(
    mini_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, mini_flux)
    scaled(monkeypatch, 3.3e38)  # fp32's maximum is 3.4e38, and this weighting gives gradients above 1
    quiet = ("objective.weighting={name: sigma_sqrt}", "sample.prompts=[]", "output.export_base=false")
    run = run_here(recipe, "train.steps=16", *quiet)
    rows = read_metrics(run / "metrics.csv")
    finite = [math.isfinite(row.grad_norm) for row in rows]
    assert not all(finite), [(row.loss, row.grad_norm) for row in rows]
    assert finite[-1]
    assert all(math.isfinite(row.loss) for row in rows)


def test_a_norm_that_stays_infinite_ends_the_run(
    mini_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, mini_flux)
    scaled(monkeypatch, 1.0)
    monkeypatch.setattr(
        fit.DiffusionModule,
        "configure_gradient_clipping",
        lambda module, *_, **__: setattr(module, "grad_norm", torch.tensor(float("inf"))),
    )
    with pytest.raises(HalfbyteError, match=r"step 25: .* inf\b.*optimizer\.lr"):
        run_here(recipe, "train.steps=40", "train.grad_accumulation=1", "sample.prompts=[]")
