"""Write a complete tiny SD3: VAE and transformer fitted to the shipped photographs, the rest random.

.venv/bin/python scripts/make_mini.py FOLDER [--seed N] [--steps N]

Some ten minutes on one CPU core. The FLUX that ships is pretrained instead: scripts/pretrain_mini.py.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from halfbyte.trainer.data import read_samples, sample_bytes
from halfbyte.trainer.families.base import TextEmbedding
from halfbyte.trainer.families.sd3 import SD3
from halfbyte.trainer.mini import build_sd3_pipeline
from halfbyte.trainer.pictures import decode, pixels
from halfbyte.trainer.randomness import generator

PHOTOS = Path(__file__).parents[1] / "recipes" / "photos"
SIDE = 64  # pixels
TEXT_TOKENS = 64  # as the mini recipes pad captions

CARD = """---
license: apache-2.0
library_name: diffusers
---

# A miniature SD3.5

Every component of SD3.5 in its own class, with about a million parameters in all: for trying the whole path
of training, export and loading on a machine without an accelerator. What it draws are coloured shapes.

- VAE: {steps} steps on crops of the photographs in `recipes/photos` (see LICENSES.md there), enough to keep
  shapes and colours of a {side}-pixel picture. Its scaling and shift factors are measured on them.
- Transformer: {steps} steps on such crops under captions that say nothing ("A photo."), {tokens} T5 tokens a
  caption: it knows what photographs look like in general, and which caption means which is left to learn.
- Text encoders: random weights of seed {seed} (`halfbyte.trainer.mini`). No layer is zero or gated away.
- Tokenizers: made from code; CLIP's knows every byte, T5's the printable Latin-1 characters.
- Scheduler: the settings of SD3.5.

Made by `scripts/make_mini.py FOLDER`. bf16, safetensors.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=2000, help="of VAE and transformer; 0 leaves both random"
    )
    arguments = parser.parse_args()
    # One thread: sums in a fixed order give the same weights again on the same machine.
    torch.set_num_threads(1)
    photos = [decode(sample_bytes(sample)) for sample in read_samples(PHOTOS)]
    pipeline = build_sd3_pipeline(arguments.seed)
    if arguments.steps:
        fit_vae(pipeline.vae, photos, steps=arguments.steps, seed=arguments.seed)
    pipeline.save_pretrained(arguments.folder)
    if arguments.steps:
        fit_transformer(arguments.folder, photos, steps=arguments.steps, seed=arguments.seed)
    card = CARD.format(seed=arguments.seed, steps=arguments.steps, side=SIDE, tokens=TEXT_TOKENS)
    (arguments.folder / "README.md").write_text(card, encoding="utf-8")


def fit_vae(vae: AutoencoderKL, photos: list[Image.Image], *, steps: int, seed: int) -> None:
    """Fits the VAE to crops of the photographs, in place; its last state is bf16, as before.

    The loss is the L1 distance, the squared distance of 8-pixel means (colour before detail) and a KL term so
    small that it only keeps the latents near unit size.
    """
    nn.Module.to(vae, torch.float32).requires_grad_(True)
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    draws = generator(seed, "mini/crops")
    for step in range(steps):
        batch = torch.stack([_crop(photos, (SIDE, SIDE), draws, least=0.3) for _ in range(8)])
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=draws)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - batch
        coarse = nn.functional.avg_pool2d(error, 8).square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error.abs().mean() + 4 * coarse + 1e-3 * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(
                f"VAE step {step}: L1 {error.abs().mean():.4f}, coarse {coarse:.5f}, KL {kl:.3f}", flush=True
            )
    nn.Module.to(vae.requires_grad_(False), torch.bfloat16)
    _measure_scale(vae, photos)


@torch.no_grad()
def _measure_scale(vae: AutoencoderKL, photos: list[Image.Image]) -> None:
    """Sets shift and scale so that the latents of the photographs have mean 0 and deviation 1."""
    latents = torch.stack(
        [
            vae.encode(pixels(photo, box=_square(photo), size=(SIDE, SIDE), flip=False)[None].bfloat16())
            .latent_dist.mean[0]
            .float()
            for photo in photos
        ]
    )
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )


def fit_transformer(folder: Path, photos: list[Image.Image], *, steps: int, seed: int) -> None:
    """Fits the saved pipeline's transformer to the velocity noise - x0 on crops, in fp32, and saves it in bf16.

    Every crop gets one of a few captions at random, hence learns nothing from them.
    """
    family = SD3.open(str(folder), None, TEXT_TOKENS)
    draws = generator(seed, "mini/transformer")
    with TemporaryDirectory() as memo:
        encoders = family.load_encoders(device=torch.device("cpu"), dtype=torch.bfloat16, memo=Path(memo))
    text = encoders.encode_texts(["", "A photo.", "A picture.", "A photograph of something."])
    pools = [
        encoders.encode_images(torch.stack([_crop(photos, size, draws, least=0.5) for _ in range(320)]))
        for size in ((SIDE, SIDE), (80, 48), (48, 80))
    ]
    denoiser = SD3.denoiser_class.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=2e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        pool = pools[step % len(pools)]
        chosen = torch.randint(len(pool.mean), (16,), generator=draws)
        captions = torch.randint(len(text.prompt_embeds), (16,), generator=draws)
        posterior_noise, noise = torch.randn((2, *pool.mean[chosen].shape), generator=draws)
        latents = family.scale_latents(pool.mean[chosen] + pool.std[chosen] * posterior_noise)
        # Logit-normal, moved towards noise by the shift of FLUX.1-dev at its smallest pictures.
        sigma = torch.sigmoid(torch.randn(16, generator=draws) + 0.5)
        weight = sigma[:, None, None, None]
        velocity = family.predict(
            denoiser,
            (1 - weight) * latents + weight * noise,
            sigma,
            TextEmbedding(text.prompt_embeds[captions].float(), text.pooled_prompt_embeds[captions].float()),
            guidance_scale=1.0,
        )
        loss = nn.functional.mse_loss(velocity, noise - latents)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"transformer step {step}: loss {loss:.4f}", flush=True)
    denoiser.register_to_config(_name_or_path="")  # else the folder's path is saved
    nn.Module.to(denoiser, torch.bfloat16).save_pretrained(folder / "transformer")


def _crop(
    photos: list[Image.Image], size: tuple[int, int], draws: torch.Generator, *, least: float
) -> Tensor:
    """A part of a photograph, `least` to all of what fits, as (3, H, W) in [-1, 1] at size (W, H)."""
    which, share, across, down, mirrored = torch.rand(5, generator=draws).tolist()
    photo = photos[int(which * len(photos))]
    scale = min(photo.width / size[0], photo.height / size[1]) * (least + (1 - least) * share)
    width, height = int(size[0] * scale), int(size[1] * scale)
    left, top = round(across * (photo.width - width)), round(down * (photo.height - height))
    return pixels(photo, box=(left, top, left + width, top + height), size=size, flip=mirrored < 0.5)


def _square(photo: Image.Image) -> tuple[int, int, int, int]:
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return (left, top, left + side, top + side)


if __name__ == "__main__":
    main()
