"""The second stage: the transformer and both text encoders, on the flow-matching objective of the trainer."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from diffusers import FluxPipeline
from pretrain_looks import Batch, PictureTable
from pretrain_pace import Pace
from torch import Tensor, nn

from halfbyte.trainer.families.flux import image_ids, pack
from halfbyte.trainer.shift import ResolutionShift
from halfbyte.trainer.timesteps import LogitNormal

_LEARNING_RATE = 1.5e-3
_CAPTION_DROPOUT = 0.1  # so that classifier-free guidance with an empty prompt works
_GUIDANCE = (1.0, 5.0)  # what the guidance embedding is told: anything, as the objective knows no guidance
_AVERAGED = 0.999  # of the averaged weights stays at a step
_SAVE_SECONDS = 60.0

_TIMESTEPS = LogitNormal(name="logit_normal")
_SHIFT = ResolutionShift(name="resolution")


class Denoiser(nn.Module):
    """Text tokens and noisy latents to velocity: what the stage trains, as one module."""

    def __init__(self, pipeline: FluxPipeline) -> None:
        super().__init__()
        self.transformer = pipeline.transformer
        self.text_encoder = pipeline.text_encoder
        self.text_encoder_2 = pipeline.text_encoder_2

    def forward(self, noisy: Tensor, sigma: Tensor, t5: Tensor, clip: Tensor, guidance: Tensor) -> Tensor:
        """noisy (B, 16, 16, 16), sigma and guidance (B,) fp32 -> velocity, packed (B, 64, 64)."""
        _, _, height, width = noisy.shape
        device = noisy.device
        prompt = self.text_encoder_2(t5).last_hidden_state
        pooled = self.text_encoder(clip).pooler_output
        return self.transformer(
            hidden_states=pack(noisy),
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=image_ids(height, width, device),
            txt_ids=torch.zeros(prompt.shape[1], 3, device=device),
            guidance=guidance,
            return_dict=False,
        )[0]


def train_denoiser(
    pipeline: FluxPipeline,
    table: PictureTable,
    *,
    batch: int,
    pace: Pace,
    compiled: bool,
    save: Callable[[], None],
) -> float:
    """Trains in place; the weights left in the pipeline are the averaged ones. Returns the last mean loss."""
    device = table.device
    denoiser = Denoiser(pipeline).to(device).train().requires_grad_(True)
    averaged = copy.deepcopy(denoiser).requires_grad_(False)
    if compiled:
        denoiser.transformer.compile_repeated_blocks(fullgraph=True)
    weights, averages = list(denoiser.parameters()), list(averaged.parameters())
    optimizer = torch.optim.AdamW(
        weights, lr=_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    scale, shift = pipeline.vae.config.scaling_factor, pipeline.vae.config.shift_factor
    saved = 0.0
    mean_loss = torch.zeros((), device=device)
    step = 0
    while pace.running(step):
        point = _corrupt(table.draw(batch, dropout=_CAPTION_DROPOUT), scale, shift)
        with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext():
            velocity = denoiser(*point.inputs)
        loss = nn.functional.mse_loss(velocity.float(), pack(point.target))
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * pace.factor(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, max(1 - _AVERAGED, 1 / (step + 1)))
            mean_loss.lerp_(loss.detach(), max(0.01, 1 / (step + 1)))
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


@dataclass(frozen=True)
class _Point:
    """A point on the path from data to noise for each sample, and the velocity there."""

    inputs: tuple[Tensor, ...]  # of the denoiser
    target: Tensor  # (B, 16, 16, 16) fp32: noise - x0


def _corrupt(batch: Batch, scale: float, shift: float) -> _Point:
    mean = batch.mean
    latents = (mean + batch.std * torch.randn_like(mean) - shift) * scale
    noise = torch.randn_like(latents)
    u = torch.rand(len(latents), device=mean.device, dtype=torch.float64)
    tokens = latents[0, 0].numel() // 4
    # Rounded as the transformer will see it, which casts the timestep to its hidden states' bf16.
    sigma = _SHIFT.apply(_TIMESTEPS.sigmas(u), tokens).bfloat16().float()
    weight = sigma[:, None, None, None]
    low, high = _GUIDANCE
    guidance = low + (high - low) * torch.rand(len(latents), device=mean.device)
    noisy = ((1 - weight) * latents + weight * noise).bfloat16()
    noisy = noisy if mean.device.type == "cuda" else noisy.float()
    return _Point((noisy, sigma, batch.t5, batch.clip, guidance), noise - latents)


def _leave(pipeline: FluxPipeline, averaged: Denoiser) -> None:
    """Registers the averaged models as the pipeline's own."""
    pipeline.register_modules(
        transformer=averaged.transformer,
        text_encoder=averaged.text_encoder,
        text_encoder_2=averaged.text_encoder_2,
    )
