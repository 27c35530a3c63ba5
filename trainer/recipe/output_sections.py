"""The recipe's sections on what is seen of a run and what it leaves: validation, averages, samples, checkpoints, files.

Fields are described as in `recipe_sections`.
"""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from halfbyte.trainer.hub.reference import is_repository
from halfbyte.trainer.recipe.fields import FilePath, PictureSide, Section, Seed, Texts
from halfbyte.trainer.registry import conflict
from halfbyte.trainer.wording import shown


def _check_sigmas(sigmas: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(sigmas)) != len(sigmas):
        raise ValueError(f"got {shown(list(sigmas))}, expected each noise level once")
    return sigmas


NoiseLevels = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], ...],
    Field(strict=False, min_length=1),
    AfterValidator(_check_sigmas),
]


class ValidationSection(Section):
    """Pictures held out of training, on which the loss at fixed noise tells how much a run has learned."""

    path: FilePath | None = None
    """A folder of pictures with captions, as data.path, that are not trained on; null: none, or those that
    held_out sets aside."""
    held_out: int = Field(default=0, ge=0)
    """How many of data.path's own pictures are set aside instead, chosen by their contents alone; 0: none."""
    sigmas: NoiseLevels = (0.1, 0.3, 0.5, 0.7, 0.9)
    """The noise levels at which each picture is measured, as the model is told them: a plain list and not the
    run's own density, so that runs with other timesteps, shift or loss compare."""
    every: int = Field(default=0, ge=0)
    """Optimizer steps between measurements; 0: only before and after."""

    @property
    def wanted(self) -> bool:
        """Whether there is anything to measure on."""
        return self.path is not None or self.held_out > 0

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.path is not None and self.held_out:
            raise conflict("held_out", f"got {self.held_out}, expected 0 where validation.path is given")
        if self.every and not self.wanted:
            raise conflict(
                "every", f"got {self.every}, expected 0 where neither validation.path nor held_out is given"
            )
        return self


class EmaSection(Section):
    """A moving average of the adapter, for validation, samples and what is exported. The weights that train stay
    in the checkpoints, as a LoRA file of their own: trained_lora_weights.safetensors."""

    decay: float | None = Field(default=None, gt=0, lt=1)
    """Share of the average that each step keeps: 0.99 averages over about 100 steps; null: no average. It takes as
    much device memory as the adapter, once more while samples are drawn."""
    every: int = Field(default=1, ge=1)
    """Optimizer steps between updates, each with the decay of as many steps."""
    warmup: bool = True
    """Lower the decay in the beginning, to (1 + n) / (10 + n) at update n, so that the average leaves the start."""

    @model_validator(mode="after")
    def _something_to_average(self) -> Self:
        if self.decay is None and self.every != 1:
            raise conflict("every", f"got {self.every}, expected 1 where ema.decay is null")
        if self.decay is None and not self.warmup:
            raise conflict("warmup", "got false, expected true where ema.decay is null")
        return self


class SampleSection(Section):
    """Pictures drawn with the pipeline's own sampler: before, during and after training."""

    prompts: Texts = ()
    """One picture each; none: nothing is drawn."""
    references: FilePath | None = None
    """A folder of pictures, with captions as in data.path, that show what prompts should give: where a prompt is a
    caption there, the summary tells how far the drawn pictures are from it before and after; null: none."""
    every: int = Field(default=0, ge=0)
    """Optimizer steps between pictures; 0: only before and after."""
    steps: int = Field(default=28, ge=1)
    """Sampling steps."""
    guidance_scale: float = Field(default=3.5, ge=0)
    """As the pipeline takes it: told to FLUX.1-dev, classifier-free guidance for SD3."""
    width: PictureSide = 1024
    """Pixels."""
    height: PictureSide = 1024
    """Pixels."""
    seed: Seed = 0
    """The same noise at every drawing, so that pictures compare."""

    @model_validator(mode="after")
    def _something_to_draw(self) -> Self:
        if self.every and not self.prompts:
            raise conflict("every", f"got {self.every}, expected 0 where sample.prompts is empty")
        if self.references is not None and not self.prompts:
            raise conflict(
                "references", f"got {self.references}, expected null where sample.prompts is empty"
            )
        return self


class CheckpointSection(Section):
    """What a run continues from."""

    every: int = Field(default=250, ge=1)
    """Optimizer steps between checkpoints; the last step always has one."""
    keep: int = Field(default=2, ge=1)
    """Older ones are deleted."""


def _check_repository(name: str) -> str:
    if not is_repository(name):
        raise ValueError(f"got {shown(name)}, expected a Hub repository as owner/name")
    return name


Formats = Annotated[tuple[Literal["diffusers", "comfyui", "kohya"], ...], Field(strict=False, min_length=1)]


class OutputSection(Section):
    """What is left behind."""

    dir: FilePath
    """The run's folder; a relative path starts from the current folder."""
    log_every: int = Field(default=1, ge=1)
    """Optimizer steps between rows of metrics."""
    formats: Formats | None = None
    """What the adapter is written for: diffusers (and PEFT), comfyui, kohya; null: all that can hold it, which is
    diffusers alone where lora.dora is true."""
    export_base: bool = True
    """Also write the quantized transformer, for stock diffusers."""
    self_check: bool = True
    """Have stock diffusers load what is exported, in a process of its own, and compare its prediction with ours; an
    export that fails is not put in place."""
    push_to_hub: Annotated[str, AfterValidator(_check_repository)] | None = None
    """A Hub repository, as owner/name, that the finished run is pushed to as `halfbyte push` does; null: none. Login,
    rights and name are checked before anything is loaded."""
    hub_private: bool = True
    """Whether a push makes a private repository where there is none; one that exists stays as it is."""
