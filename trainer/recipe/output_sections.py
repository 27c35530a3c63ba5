"""Recipe sections for a run's results: validation, ema, sample, checkpoint and output.

The strings under the fields describe them, as in `sections`.
"""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from halfbyte.trainer.hub.reference import is_repository
from halfbyte.trainer.recipe.fields import FilePath, Interval, PictureSide, Section, Seed, Steps, Texts
from halfbyte.trainer.registry import conflict
from halfbyte.trainer.wording import shown


def _check_sigmas(sigmas: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(sigmas)) != len(sigmas):
        raise ValueError(f"got {shown(list(sigmas))}, expected different noise levels, each listed once")
    return sigmas


NoiseLevels = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], ...],
    Field(strict=False, min_length=1),
    AfterValidator(_check_sigmas),
]


class ValidationSection(Section):
    """Images held out of training. Their loss at fixed noise levels measures how much a run has learned. At most one
    of path and held_out may be given; without either, nothing is measured."""

    path: FilePath | None = None
    """A folder of images with captions, in the same form as data.path, that are not trained on. null measures on the
    images that held_out sets aside, if any."""
    held_out: int = Field(default=0, ge=0, le=1_000_000)
    """The number of images of data.path that are set aside for validation; 0 sets none aside. The choice depends only
    on the images' contents, so it is the same for every seed and file name."""
    sigmas: NoiseLevels = (0.1, 0.3, 0.5, 0.7, 0.9)
    """The noise levels, above 0 and up to 1, at which each image is measured. They are given to the model unchanged,
    whatever objective.timesteps and objective.shift say, so that runs with different objectives can be compared."""
    every: Interval = 0
    """Optimizer steps between measurements; 0 measures only before and after training."""

    @property
    def wanted(self) -> bool:
        """True if there are images to measure on."""
        return self.path is not None or self.held_out > 0

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.path is not None and self.held_out:
            raise conflict("held_out", f"got {self.held_out}, expected 0 because validation.path is given")
        if self.every and not self.wanted:
            raise conflict(
                "every", f"got {self.every}, expected 0 because neither validation.path nor held_out is given"
            )
        return self


class EmaSection(Section):
    """An exponential moving average of the adapter's weights, used for validation, samples and the exported adapter.
    Checkpoints also keep the weights that are being trained, in trained_lora_weights.safetensors."""

    decay: float | None = Field(default=None, gt=0, lt=1)
    """The share of the average that each step keeps; null turns averaging off. 0.99 averages over about 100 steps. The
    average takes as much device memory as the adapter, and the same again while samples are generated."""
    every: Steps = 1
    """Optimizer steps between updates of the average. Each update applies the decay of that many steps; larger values
    save a little time."""
    warmup: bool = True
    """Use a lower decay at first, at most (1 + n) / (10 + n) at update n, so that the untrained adapter does not weigh
    on the average."""

    @model_validator(mode="after")
    def _something_to_average(self) -> Self:
        if self.decay is None and self.every != 1:
            raise conflict("every", f"got {self.every}, expected 1 because ema.decay is null")
        if self.decay is None and not self.warmup:
            raise conflict("warmup", "got false, expected true because ema.decay is null")
        return self


class SampleSection(Section):
    """Sample images, generated with the stock pipeline's own sampler before, during and after training."""

    prompts: Texts = ()
    """Prompts to generate one image each; an empty list turns samples off."""
    references: FilePath | None = None
    """A folder of reference images with captions, in the same form as data.path; null uses none. For each prompt that
    equals the caption of a reference image, the summary reports the distance of the generated image from it before
    and after training."""
    every: Interval = 0
    """Optimizer steps between samples; 0 generates them only before and after training."""
    steps: int = Field(default=28, ge=1, le=1000)
    """Sampling steps per image. FLUX.1-schnell needs only 4."""
    guidance_scale: float = Field(default=3.5, ge=0)
    """The guidance scale, as the pipeline uses it: an input of the model for FLUX.1-dev, classifier-free guidance for
    SD3 (two model evaluations per step above 1). FLUX.1-schnell does not use it."""
    width: PictureSide = 1024
    """The width of the images, in pixels. Smaller images decode with less memory."""
    height: PictureSide = 1024
    """The height of the images, in pixels."""
    seed: Seed = 0
    """The seed of the initial noise; prompt number n, counted from 0, uses seed + n. The noise is the same each time,
    so that images from different steps can be compared."""

    @model_validator(mode="after")
    def _something_to_draw(self) -> Self:
        if self.every and not self.prompts:
            raise conflict("every", f"got {self.every}, expected 0 because sample.prompts is empty")
        if self.references is not None and not self.prompts:
            raise conflict(
                "references", f"got {self.references}, expected null because sample.prompts is empty"
            )
        return self


class CheckpointSection(Section):
    """Checkpoints, from which `--resume` continues a run."""

    every: Steps = 250
    """Optimizer steps between checkpoints. The last step always writes one."""
    keep: int = Field(default=2, ge=1, le=1_000_000)
    """The number of latest checkpoints to keep; older ones are deleted."""


def _check_repository(name: str) -> str:
    if not is_repository(name):
        raise ValueError(f"got {shown(name)}, expected a Hub repository as owner/name")
    return name


Formats = Annotated[tuple[Literal["diffusers", "comfyui", "kohya"], ...], Field(strict=False, min_length=1)]


class OutputSection(Section):
    """The results of a run: its folder, metrics, exported files and an optional upload."""

    dir: FilePath
    """The run's folder, for logs, samples, checkpoints and exports; a relative path starts from the current folder.
    It must not lie inside data.path."""
    log_every: Steps = 1
    """Optimizer steps between rows of the metrics."""
    formats: Formats | None = None
    """The formats in which the adapter is exported: diffusers (also read by PEFT), comfyui and kohya. null exports all
    formats that can hold the adapter: all three, or only diffusers with lora.dora."""
    export_base: bool = True
    """Also export the quantized transformer in a form that stock diffusers loads. false saves its disk space."""
    self_check: bool = True
    """Load the export with stock diffusers in a separate process and compare its prediction with the trainer's own. An
    export that fails the check does not replace an earlier one."""
    push_to_hub: Annotated[str, AfterValidator(_check_repository)] | None = None
    """The Hub repository, as owner/name, to which the finished run is pushed, as with `halfbyte push`; null pushes
    nothing. Login, write access and name are checked before anything is loaded."""
    hub_private: bool = True
    """Make the repository private if the push creates it; false makes it public. An existing repository keeps its
    visibility."""
