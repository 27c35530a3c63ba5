"""The first stage of pretraining: an autoencoder for the corpus's images."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from scripts.mini.images.corpus import Corpus
from scripts.mini.images.looks import as_input, draw_all
from scripts.mini.pace import Pace

_LEARNING_RATE = 1.5e-3
_KL = 1e-5  # per latent number: keeps latents near unit size without loss of sharpness
_EDGES = 1.0  # weight of the gradients' distance relative to the pixels', for sharpness
_COARSE = 1.0  # weight of the loss on latents shrunk to half, see `_loss`
_COARSE_EVERY = 4  # steps


def train_vae(vae: AutoencoderKL, corpus: Corpus, *, batch: int, pace: Pace, device: torch.device) -> float:
    """Fits the VAE in place, and measures its scale and shift; fp32 weights, bf16 arithmetic on a GPU.

    Returns the peak signal-to-noise ratio over the corpus in decibels.
    """
    nn.Module.to(vae, device, memory_format=torch.channels_last).train().requires_grad_(True)
    table = draw_all(corpus.sprites.to(device))
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    step = 0
    while pace.running(step):
        pictures = _varied(table, batch).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, error = _loss(vae, pictures, with_coarse=step % _COARSE_EVERY == 0)
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * pace.factor(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if pace.due(step):
            pace.tell(step, f"loss {loss:.4f}, L1 {error:.4f}")
        step += 1
        if pace.measures(step):
            error.item()
    nn.Module.to(vae.eval().requires_grad_(False), memory_format=torch.contiguous_format)
    return _measure(vae, table)


def _loss(vae: AutoencoderKL, pictures: Tensor, *, with_coarse: bool) -> tuple[Tensor, Tensor]:
    """Returns (loss, mean L1 distance) of (B, 3, 64, 64) in [-1, 1].

    One term makes latents shrunk to half decode to the image shrunk to half: latents whose coarse part has a
    meaning without the rest are easier to generate (Skorokhodov et al. 2025, arXiv 2502.14831).
    """
    posterior = vae.encode(pictures).latent_dist
    mean, std = posterior.mean.float(), posterior.std.float()
    latents = mean + std * torch.randn_like(mean)
    decoded = vae.decode(latents).sample.float()
    error = (decoded - pictures).abs().mean()
    edges = sum((_difference(decoded, axis) - _difference(pictures, axis)).abs().mean() for axis in (-1, -2))
    kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
    loss = error + _EDGES * edges + _KL * kl
    if with_coarse:
        half = vae.decode(functional.avg_pool2d(latents, 2)).sample.float()
        loss = loss + _COARSE * (half - functional.avg_pool2d(pictures, 2)).abs().mean()
    return loss, error.detach()


def _difference(pictures: Tensor, axis: int) -> Tensor:
    length = pictures.shape[axis]
    return pictures.narrow(axis, 1, length - 1) - pictures.narrow(axis, 0, length - 1)


def _varied(table: Tensor, batch: int) -> Tensor:
    """Returns images of the corpus, (B, 3, 64, 64) in [-1, 1], half of them recolored, mirrored or shifted.

    An autoencoder must reconstruct images that it is given later, so it sees more than the corpus's own
    colors. It does not see the held-out style.
    """
    device = table.device
    pictures = as_input(table[torch.randint(len(table), (batch,), device=device)])
    order = torch.rand(batch, 3, device=device).argsort(dim=1)
    shuffled = pictures.gather(1, order[:, :, None, None].expand_as(pictures))
    scale, base = torch.rand(2, batch, 3, 1, 1, device=device)
    base = 2 * base - 1
    recolored = base + (shuffled - base) * (0.3 + 0.7 * scale)
    recolored = recolored.roll(tuple(torch.randint(0, 64, (2,)).tolist()), dims=(-2, -1))
    keep = torch.rand(batch, 1, 1, 1, device=device) < 0.5
    mirrored = torch.rand(batch, 1, 1, 1, device=device) < 0.5
    return torch.where(keep, pictures, torch.where(mirrored, recolored.flip(-1), recolored))


@torch.no_grad()
def _measure(vae: AutoencoderKL, table: Tensor) -> float:
    """Sets shift and scale so that the latents of the corpus have mean 0 and standard deviation 1; see `train_vae`."""
    means: list[Tensor] = []
    errors: list[Tensor] = []
    for part in table.split(512):
        pictures = as_input(part)
        means.append(vae.encode(pictures).latent_dist.mean)
        errors.append((vae.decode(means[-1]).sample - pictures).square().mean(dim=(1, 2, 3)))
    latents = torch.cat(means)
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )
    decibels = -10 * torch.log10(torch.cat(errors).mean() / 4).item()
    spread = latents.std(dim=(0, 2, 3)).sort().values
    deviations = [round(value, 2) for value in spread.tolist()]
    print(f"VAE: {decibels:.1f} dB PSNR; latents' deviation by channel {deviations}", flush=True)
    return decibels
