"""The second stage: the transformer and both text encoders, on the flow-matching objective of the trainer."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline
from pretrain_corpus import Emoji
from pretrain_flux import FluxDenoiser, build_flux
from pretrain_looks import Batch, PictureTable
from pretrain_pace import Pace
from pretrain_sd3 import SD3Denoiser, build_sd3
from torch import Tensor, nn

from halfbyte.trainer.shift import ResolutionShift, Shift, StaticShift
from halfbyte.trainer.timesteps import LogitNormal

_LEARNING_RATE = 1.2e-3
_DISTILLING_RATE = 5e-4
CAPTION_DROPOUT = 0.1  # so that classifier-free guidance with an empty prompt works
_GUIDANCE = (1.0, 5.0)  # what the guidance embedding is told: anything, as the objective knows no guidance
_AVERAGED = 0.999  # of the averaged weights stays at a step
_SAVE_SECONDS = 60.0

_TIMESTEPS = LogitNormal(name="logit_normal")


@dataclass(frozen=True)
class Kind:
    """All in which the miniatures' families differ."""

    build: Callable[[tuple[Emoji, ...], AutoencoderKL], DiffusionPipeline]
    pipeline: type[DiffusionPipeline]
    denoiser: type[nn.Module]  # of a pipeline; (noisy, sigma, t5, clip, guidance) -> velocity
    shift: Shift  # the scheduler's own
    t5_tokenizer: str
    told_guidance: bool  # whether the transformer has an embedding for it


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
    """The VAE's: latents of deviation one are (posterior - shift) * scale."""

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
    """Draws latent, noise, sigma and the guidance that the model is told."""
    mean = batch.mean
    latents = (mean + batch.std * torch.randn_like(mean) - scaling.shift) * scaling.scale
    noise = torch.randn_like(latents)
    u = torch.rand(len(latents), device=mean.device, dtype=torch.float64)
    tokens = latents[0, 0].numel() // 4
    # Rounded as the transformer will see it, which casts the timestep to its hidden states' bf16.
    sigma = shift.apply(_TIMESTEPS.sigmas(u), tokens).bfloat16().float()
    weight = sigma[:, None, None, None]
    low, high = _GUIDANCE
    guidance = low + (high - low) * torch.rand(len(latents), device=mean.device)
    noisy = (1 - weight) * latents + weight * noise
    noisy = noisy.bfloat16() if noisy.device.type == "cuda" else noisy
    return Point(noisy, sigma, guidance, noise - latents)


def train_denoiser(
    kind: Kind,
    pipeline: DiffusionPipeline,
    table: PictureTable,
    *,
    batch: int,
    pace: Pace,
    compiled: bool,
    save: Callable[[], None],
) -> float:
    """Trains in place; the weights left in the pipeline are the averaged ones. Returns the last mean loss."""
    denoiser = kind.denoiser(pipeline).to(table.device)
    scaling = Scaling.of(pipeline)

    def loss() -> Tensor:
        drawn = table.draw(batch, dropout=CAPTION_DROPOUT)
        point = corrupt(drawn, scaling, kind.shift)
        velocity = denoiser(point.noisy, point.sigma, drawn.t5, drawn.clip, point.guidance)
        return nn.functional.mse_loss(velocity.float(), point.target)

    return fit(
        pipeline, denoiser, loss, learning_rate=_LEARNING_RATE, pace=pace, compiled=compiled, save=save
    )


def distill_guidance(
    kind: Kind,
    pipeline: DiffusionPipeline,
    table: PictureTable,
    *,
    batch: int,
    pace: Pace,
    compiled: bool,
    save: Callable[[], None],
) -> float:
    """Teaches the guidance embedding what classifier-free guidance of that scale would have answered.

    As FLUX.1-dev came to be (Meng et al. 2022, arXiv 2210.03142, first stage): one evaluation a step instead of
    two. Told 1, the model goes on answering as it was trained; see `train_denoiser` for the rest.
    """
    student = kind.denoiser(pipeline).to(table.device)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    if compiled:
        teacher.transformer.compile_repeated_blocks(fullgraph=True)
    scaling = Scaling.of(pipeline)
    empty_t5, empty_clip = (ids.long().expand(batch, -1) for ids in table.empty)

    def loss() -> Tensor:
        drawn = table.draw(batch, dropout=CAPTION_DROPOUT)
        point = corrupt(drawn, scaling, kind.shift)
        with torch.no_grad():
            told = teacher(point.noisy, point.sigma, drawn.t5, drawn.clip, point.guidance).float()
            untold = teacher(point.noisy, point.sigma, empty_t5, empty_clip, point.guidance).float()
            target = torch.lerp(untold, told, point.guidance[:, None, None, None])
        velocity = student(point.noisy, point.sigma, drawn.t5, drawn.clip, point.guidance)
        return nn.functional.mse_loss(velocity.float(), target)

    rate = _DISTILLING_RATE
    return fit(pipeline, student, loss, learning_rate=rate, pace=pace, compiled=compiled, save=save)


def fit(
    pipeline: DiffusionPipeline,
    denoiser: nn.Module,
    loss: Callable[[], Tensor],
    *,
    learning_rate: float,
    pace: Pace,
    compiled: bool,
    save: Callable[[], None],
) -> float:
    """Minimizes a loss over fresh draws; averaged weights go into the pipeline and are saved every minute."""
    denoiser.train().requires_grad_(True)
    averaged = copy.deepcopy(denoiser).eval().requires_grad_(False)
    if compiled:
        denoiser.transformer.compile_repeated_blocks(fullgraph=True)
    weights, averages = list(denoiser.parameters()), list(averaged.parameters())
    device = weights[0].device
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    saved = 0.0
    mean_loss = torch.zeros((), device=device)
    step = 0
    while pace.running(step):
        with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
            value = loss()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * pace.factor(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, max(1 - _AVERAGED, 1 / (step + 1)))
            mean_loss.lerp_(value.detach(), max(0.01, 1 / (step + 1)))
        if pace.due(step):
            pace.tell(step, f"loss {mean_loss:.4f}")
        if pace.seconds - saved > _SAVE_SECONDS:
            saved = pace.seconds
            _leave(pipeline, averaged)
            save()
        step += 1
    _leave(pipeline, averaged)
    save()
    return mean_loss.item()


def _leave(pipeline: DiffusionPipeline, averaged: nn.Module) -> None:
    """Registers the averaged models as the pipeline's own."""
    pipeline.register_modules(**dict(averaged.named_children()))
