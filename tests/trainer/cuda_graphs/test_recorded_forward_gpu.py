"""Sampling with CUDA graphs: images are bitwise identical to those without; memory is freed afterwards.

If a comparison fails, the message says which image differs and by how much.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from halfbyte.quant.convert.recipe import QuantRecipe
from halfbyte.trainer.adapters.lora import add_lora, trained_parameters
from halfbyte.trainer.cuda_graphs import recorder
from halfbyte.trainer.cuda_graphs.forward import recorded_forwards
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.flux.family import Flux
from halfbyte.trainer.families.sd3.family import SD3
from halfbyte.trainer.sample.draw import compile_blocks
from halfbyte.trainer.sample.sampler import PictureSettings, PipelineCall
from halfbyte.trainer.sample.strength import AdapterStrength

from device_memory import hands_blocks_back, reserved
from runs import run_here, write_recipe
from sample_calls import drawn_pixels, invoke
from steps import text_of

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
FAMILIES = pytest.mark.parametrize(("family_class", "fixture"), [(Flux, "mini_flux"), (SD3, "mini_sd3")])
Job = tuple[float, int]  # strength, seed


class Sampler:
    """A miniature with adapters in the stock pipeline."""

    def __init__(self, family: Family, *, compiled: bool = False, backend: str = "deterministic") -> None:
        self.family = family
        denoiser: Any = load_base(
            family, QuantRecipe(compute_dtype=torch.bfloat16), device=CUDA, dtype=torch.bfloat16
        )
        targets = family.lora_targets("all-linear")
        add_lora(denoiser, rank=4, alpha=8, dropout=0.0, targets=targets, init="gaussian", seed=1)
        draws = torch.Generator().manual_seed(7)
        for name, parameter in trained_parameters(denoiser).items():
            if ".lora_B." in name:
                parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=draws))
        family.fuse_blocks(denoiser, BlockSettings("inputs", backend=backend))
        if compiled:
            compile_blocks(denoiser, family)
        self.denoiser: nn.Module = denoiser.to(CUDA).eval()
        self._strength = AdapterStrength(denoiser)
        absent: dict[str, Any] = dict.fromkeys((*family.text_components, "vae"))
        self._pipeline: Any = family.pipeline_class.from_pretrained(
            family.source.folder, transformer=denoiser, dtype=torch.bfloat16, **absent
        )
        self._pipeline.vae_scale_factor = family.vae_scale
        self._pipeline.set_progress_bar_config(disable=True)

    def call(self, px: int, steps: int) -> PipelineCall:
        settings = PictureSettings(steps, 3.5, px, px)
        text = text_of(self.family, 0)
        return PipelineCall(self.family, self._pipeline, text, settings, CUDA, torch.bfloat16)

    def latents(self, jobs: Sequence[Job], *, px: int = 64, steps: int = 4) -> list[Tensor]:
        call, found = self.call(px, steps), []
        for strength, seed in jobs:
            self._strength.set(strength)
            found.append(call.draw(text_of(self.family, seed), seed, output_type="latent").clone())
        return found


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor], jobs: Sequence[Job]) -> str:
    """Returns "" if all latents are bitwise identical; else which differ."""
    wrong = [
        f"strength {job[0]}, seed {job[1]}: {(one - other).abs().max():.3g} of {other.abs().max():.3g}"
        for one, other, job in zip(ours, theirs, jobs, strict=True)
        if not torch.equal(one, other)
    ]
    return "; ".join(wrong)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Returns the log lines about graphs that could not be recorded."""
    return [record.getMessage() for record in caplog.records if record.name == recorder.__name__]


def compared(sampler: Sampler, jobs: Sequence[Job], caplog: pytest.LogCaptureFixture) -> None:
    """Compares recorded and plain sampling of one model; skips if two plain runs already differ."""
    expected = sampler.latents(jobs)
    repeat = difference(sampler.latents(jobs), expected, jobs)
    if repeat:
        pytest.skip(f"without graphs a repeat is not the same here: {repeat}")
    assert all(torch.isfinite(one).all() for one in expected)
    with recorded_forwards(sampler.denoiser) as forwards:
        recorded = sampler.latents(jobs)
        assert warnings(caplog) == []
        assert forwards.shapes == 1
    assert difference(recorded, expected, jobs) == ""
    assert difference(sampler.latents(jobs), expected, jobs) == "", "after the context"


@FAMILIES
def test_images_equal_those_of_plain_sampling_at_every_strength(
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    family_class: type[Family],
    fixture: str,
) -> None:
    family = family_class.open(str(request.getfixturevalue(fixture)), None, 24)
    jobs = [(1.0, 1), (1.0, 2), (0.5, 1), (0.0, 1), (0.0, 2), (0.5, 2), (1.0, 1)]
    compared(Sampler(family), jobs, caplog)


@FAMILIES
def test_compiled_blocks_are_recorded(
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    family_class: type[Family],
    fixture: str,
) -> None:
    """The same as `--compile`; compiling takes most of the time."""
    torch._dynamo.reset()
    family = family_class.open(str(request.getfixturevalue(fixture)), None, 24)
    compared(Sampler(family, compiled=True), [(1.0, 1), (0.5, 2)], caplog)


@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient"])
def test_other_attention_is_recorded_too(
    mini_flux: Path, caplog: pytest.LogCaptureFixture, backend: str
) -> None:
    sampler = Sampler(Flux.open(str(mini_flux), None, 24), backend=backend)
    try:
        sampler.latents([(1.0, 1)])
    except RuntimeError as error:
        pytest.skip(f"{backend} does not run here at this size: {error}")
    compared(sampler, [(1.0, 1), (1.0, 2)], caplog)


def test_two_sizes_share_memory_that_is_freed_afterwards(mini_flux: Path) -> None:
    sampler = Sampler(Flux.open(str(mini_flux), None, 24))
    one = [(1.0, 1)]

    def draw() -> None:
        for px in (1024, 512):
            sampler.latents(one, px=px, steps=2)

    with recorded_forwards(sampler.denoiser):
        draw()
    before = reserved()  # includes the libraries' workspaces, which stay
    with recorded_forwards(sampler.denoiser) as forwards:
        sampler.latents(one, px=1024, steps=2)
        large = reserved()
        draw()
        both = reserved()
        assert forwards.shapes == 2
    after = reserved()
    sizes = [f"{size / 2**20:.0f} MiB" for size in (before, large, both, after)]
    assert large > before, sizes
    assert both - large < 0.7 * (large - before), sizes
    assert after <= before + 2**21, sizes


def test_forwards_that_cannot_be_recorded_sample_eagerly_with_one_warning(
    mini_flux: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward calls `.item()`, which breaks a recording; torch's leftovers are cleaned up."""
    sampler, jobs = Sampler(Flux.open(str(mini_flux), None, 24)), [(1.0, 1), (0.0, 1)]
    expected = sampler.latents(jobs)
    last: Any = sampler.denoiser.norm_out
    whole = type(last).forward

    def waits(self: Any, x: Tensor, temb: Tensor) -> Tensor:
        x.float().sum().item()
        output: Tensor = whole(self, x, temb)
        return output

    stream = torch.cuda.current_stream()
    monkeypatch.setattr(type(last), "forward", waits)
    with recorded_forwards(sampler.denoiser) as forwards:
        found = sampler.latents(jobs)
        assert forwards.shapes == 0
    (line,) = warnings(caplog)
    assert line.startswith("--compile: ")
    assert torch.cuda.current_stream() == stream
    assert difference(found, expected, jobs) == "", line
    # The allocator still frees memory, and the next recording works.
    assert hands_blocks_back()
    monkeypatch.undo()
    caplog.clear()
    with recorded_forwards(sampler.denoiser) as forwards:
        assert difference(sampler.latents(jobs), expected, jobs) == ""
        assert forwards.shapes == 1, warnings(caplog)


def test_the_sample_command_records_and_generates_the_same_images(
    mini_sd3: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_here(write_recipe(tmp_path, mini_sd3, family="sd3"), "sample.prompts=[a gradient]")
    call = (run, "--seeds", 2, "--dtype", "bfloat16")
    shown = invoke(*call, "--compile", "--output", tmp_path / "shown")
    assert shown.exit_code == 0, shown.output
    (launches,) = [line for line in shown.output.splitlines() if line.startswith("launches ")]
    assert "CUDA graphs" in launches
    assert warnings(caplog) == []
    recorded = drawn_pixels(tmp_path / "recorded", *call, "--compile")
    plain = drawn_pixels(tmp_path / "plain", *call)
    assert plain.keys() == recorded.keys()
    apart = {name: abs(plain[name].astype(int) - recorded[name].astype(int)).max() for name in plain}
    assert all(numpy.array_equal(plain[name], recorded[name]) for name in plain), apart
