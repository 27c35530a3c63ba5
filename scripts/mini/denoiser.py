"""The second stage of pretraining: trains transformer and text encoders on the trainer's flow-matching objective."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline
from torch import Tensor, nn

from halfbyte.trainer.objective.shift import ResolutionShift, Shift, StaticShift
from halfbyte.trainer.objective.timesteps import LogitNormal
from scripts.mini.flux import FluxDenoiser, build_flux
from scripts.mini.images.corpus import Emoji
from scripts.mini.images.looks import Batch, PictureTable
from scripts.mini.optimizer_step import OptimizerStep
from scripts.mini.pace import Pace
from scripts.mini.sd3 import SD3Denoiser, build_sd3

_LEARNING_RATE = 1.2e-3
_DISTILLING_RATE = 1e-3
_CAPTION_DROPOUT = 0.1  # so that classifier-free guidance with an empty prompt works
_GUIDANCE = (1.0, 5.0)  # values for the guidance embedding: any, because the objective does not use guidance
_AVERAGED = 0.999  # decay of the averaged weights per step
_SAVE_SECONDS = 60.0

_TIMESTEPS = LogitNormal(name="logit_normal")


@dataclass(frozen=True)
class Kind:
    """The differences between the families of the mini pipelines."""

    build: Callable[[tuple[Emoji, ...], AutoencoderKL], DiffusionPipeline]
    pipeline: type[DiffusionPipeline]
    denoiser: type[nn.Module]  # of a pipeline; (noisy, sigma, t5, clip, guidance) -> velocity
    shift: Shift  # the scheduler's own
    t5_tokenizer: str
    told_guidance: bool  # True if the transformer has an embedding for guidance


KINDS = {
    "flux": Kind(
        build_flux, FluxPipeline, FluxDenoiser, ResolutionShift(name="resolution"), "tokenizer_2", True
    ),
    "sd3": Kind(
        build_sd3, StableDiffusion3Pipeline, SD3Denoiser, StaticShift(name="static"), "tokenizer_3", False
    ),
}


@dataclass(frozen=True)
class Scaling:
    """The VAE's scaling: (posterior - shift) * scale gives latents with a standard deviation of one."""

    scale: float
    shift: float

    @classmethod
    def of(cls, pipeline: DiffusionPipeline) -> "Scaling":
        config = pipeline.vae.config
        return cls(config.scaling_factor, config.shift_factor)


@dataclass(frozen=True)
class Point:
    """A point on the path from data to noise for each sample, and the velocity there."""

    noisy: Tensor  # (B, 16, 16, 16) bf16 on a GPU, else fp32
    sigma: Tensor  # (B,) fp32
    guidance: Tensor  # (B,) fp32
    target: Tensor  # (B, 16, 16, 16) fp32: noise - x0


def corrupt(batch: Batch, scaling: Scaling, shift: Shift) -> Point:
    """Samples latent, noise, sigma and the guidance value that the model receives."""
    mean = batch.mean
    latents = (mean + batch.std * torch.randn_like(mean) - scaling.shift) * scaling.scale
    noise = torch.randn_like(latents)
    u = torch.rand(len(latents), device=mean.device, dtype=torch.float64)
    tokens = latents[0, 0].numel() // 4
    # Rounded to bf16, because the transformer casts the timestep to the dtype of its hidden states.
    sigma = shift.apply(_TIMESTEPS.sigmas(u), tokens).bfloat16().float()
    weight = sigma[:, None, None, None]
    low, high = _GUIDANCE
    guidance = low + (high - low) * torch.rand(len(latents), device=mean.device)
    noisy = (1 - weight) * latents + weight * noise
    noisy = noisy.bfloat16() if noisy.device.type == "cuda" else noisy
    return Point(noisy, sigma, guidance, noise - latents)


@dataclass(frozen=True)
class Stage:
    """The data and the duration of a stage."""

    kind: Kind
    table: PictureTable
    batch: int
    pace: Pace
    compiled: bool  # torch.compile the transformer's blocks
    save: Callable[[], None]  # writes the pipeline as it is

    def draw(self, scaling: Scaling) -> tuple[Tensor, ...]:
        """Returns a batch: noisy latents, sigma, T5's and CLIP's tokens, guidance, target."""
        drawn = self.table.draw(self.batch, dropout=_CAPTION_DROPOUT)
        point = corrupt(drawn, scaling, self.kind.shift)
        return point.noisy, point.sigma, drawn.t5, drawn.clip, point.guidance, point.target


def train_denoiser(pipeline: DiffusionPipeline, stage: Stage) -> float:
    """Trains in place and leaves the averaged weights in the pipeline. Returns the last mean loss."""
    denoiser = stage.kind.denoiser(pipeline).to(stage.table.device)

    def loss(
        noisy: Tensor, sigma: Tensor, t5: Tensor, clip: Tensor, guidance: Tensor, target: Tensor
    ) -> Tensor:
        velocity = denoiser(noisy, sigma, t5, clip, guidance)
        return nn.functional.mse_loss(velocity.float(), target)

    return _fit(pipeline, denoiser, loss, stage, learning_rate=_LEARNING_RATE)


def distill_guidance(pipeline: DiffusionPipeline, stage: Stage) -> float:
    """Teaches the guidance embedding the answer of classifier-free guidance at that scale.

    FLUX.1-dev was made this way (Meng et al. 2022, arXiv 2210.03142, first stage): one evaluation per step
    instead of two. With a guidance of 1 the model keeps its trained answer; see `train_denoiser` for the
    rest.
    """
    student = stage.kind.denoiser(pipeline).to(stage.table.device)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    if stage.compiled:
        _compile_blocks(teacher.transformer)
    empty_t5, empty_clip = (ids.long().expand(stage.batch, -1) for ids in stage.table.empty)

    def loss(noisy: Tensor, sigma: Tensor, t5: Tensor, clip: Tensor, guidance: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            guided = teacher(noisy, sigma, t5, clip, guidance).float()
            unguided = teacher(noisy, sigma, empty_t5, empty_clip, guidance).float()
            target = torch.lerp(unguided, guided, guidance[:, None, None, None])
        velocity = student(noisy, sigma, t5, clip, guidance)
        return nn.functional.mse_loss(velocity.float(), target)

    return _fit(pipeline, student, loss, stage, learning_rate=_DISTILLING_RATE)


def _fit(
    pipeline: DiffusionPipeline,
    denoiser: nn.Module,
    loss: Callable[..., Tensor],
    stage: Stage,
    *,
    learning_rate: float,
) -> float:
    """Minimizes a loss over new samples; averages the weights into the pipeline and saves them every minute."""
    denoiser.train().requires_grad_(True)
    averaged = copy.deepcopy(denoiser).eval().requires_grad_(False)
    if stage.compiled:
        _compile_blocks(denoiser.transformer)
    weights, averages = list(denoiser.parameters()), list(averaged.parameters())
    scaling = Scaling.of(pipeline)
    take = OptimizerStep(weights, loss, learning_rate=learning_rate)
    pace = stage.pace
    saved = 0.0
    mean_loss = torch.zeros((), device=stage.table.device)
    step = 0
    while pace.running(step):
        value = take(stage.draw(scaling), learning_rate * pace.factor(step))
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, max(1 - _AVERAGED, 1 / (step + 1)))
            mean_loss.lerp_(value, max(0.01, 1 / (step + 1)))
        if pace.due(step):
            pace.tell(step, f"loss {mean_loss:.4f}")
        if pace.seconds - saved > _SAVE_SECONDS:
            saved = pace.seconds
            _leave(pipeline, averaged)
            stage.save()
        step += 1
        if pace.measures(step):
            mean_loss.item()
    _leave(pipeline, averaged)
    stage.save()
    return mean_loss.item()


def _compile_blocks(transformer: nn.Module) -> None:
    """Compiles each block as one graph; diffusers' own method does not know SD3's blocks."""
    for blocks in transformer.children():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                block.compile(fullgraph=True)


def _leave(pipeline: DiffusionPipeline, averaged: nn.Module) -> None:
    """Registers the averaged models as the pipeline's own."""
    pipeline.register_modules(**dict(averaged.named_children()))
