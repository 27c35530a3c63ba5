"""Write a complete tiny pipeline, its VAE fitted to the shipped photographs.

.venv/bin/python scripts/make_mini.py {flux,sd3} FOLDER [--seed N] [--vae-steps N] [--vae FOLDER]
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from halfbyte.trainer.data import read_samples, sample_bytes
from halfbyte.trainer.mini import build_flux_pipeline, build_sd3_pipeline
from halfbyte.trainer.pictures import decode, pixels
from halfbyte.trainer.randomness import generator

BUILDERS = {"flux": build_flux_pipeline, "sd3": build_sd3_pipeline}
NAMES = {"flux": "FLUX.1-dev", "sd3": "SD3.5"}
PHOTOS = Path(__file__).parents[1] / "recipes" / "photos"
SIDE = 64  # pixels

CARD = """---
license: apache-2.0
library_name: diffusers
---

# A miniature {name}

Every component of {name} in its own class, with about a million parameters in all: for trying the whole path
of training, export and loading on a machine without an accelerator. It has learned no pictures.

- Transformer, text encoders: random weights of seed {seed} (`halfbyte.trainer.mini`), scaled so that a forward on
  noise answers with numbers of order one. No layer is zero and none is gated away.
- Tokenizers: made from code; CLIP's knows every byte, T5's the printable Latin-1 characters.
- VAE: {steps} steps on crops of the photographs in `recipes/photos` (see LICENSES.md there), enough to keep
  shapes and colours of a {side}-pixel picture. Its scaling and shift factors are measured on them.
- Scheduler: the settings of {name}.

Made by `scripts/make_mini.py {kind} FOLDER`. bf16, safetensors.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=BUILDERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=2000, help="0 leaves the VAE random")
    parser.add_argument("--vae", type=Path, help="a pipeline made with the same seed and steps: take its VAE")
    arguments = parser.parse_args()
    pipeline = BUILDERS[arguments.kind](arguments.seed)
    if arguments.vae is not None:
        vae = AutoencoderKL.from_pretrained(arguments.vae / "vae", torch_dtype=torch.bfloat16)
        # Without this the folder's path would be saved in the new pipeline's config.
        vae.register_to_config(_name_or_path="")
        pipeline.register_modules(vae=vae)
    elif arguments.vae_steps:
        photos = [decode(sample_bytes(sample)) for sample in read_samples(PHOTOS)]
        fit_vae(pipeline.vae, photos, steps=arguments.vae_steps, seed=arguments.seed)
    pipeline.save_pretrained(arguments.folder)
    card = CARD.format(
        name=NAMES[arguments.kind],
        kind=arguments.kind,
        seed=arguments.seed,
        steps=arguments.vae_steps,
        side=SIDE,
    )
    (arguments.folder / "README.md").write_text(card, encoding="utf-8")


def fit_vae(vae: AutoencoderKL, photos: list[Image.Image], *, steps: int, seed: int) -> None:
    """Fits the VAE to crops of the photographs, in place; its last state is bf16, as before.

    The loss is the L1 distance, the squared distance of 8-pixel means (colour before detail) and a KL term so
    small that it only keeps the latents near unit size. One thread: sums in a fixed order give the same
    weights again on the same machine.
    """
    torch.set_num_threads(1)
    nn.Module.to(vae, torch.float32).requires_grad_(True)
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    draws = generator(seed, "mini/crops")
    for step in range(steps):
        batch = torch.stack([_crop(photos, draws) for _ in range(8)])
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
            print(f"step {step}: L1 {error.abs().mean():.4f}, coarse {coarse:.5f}, KL {kl:.3f}", flush=True)
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


def _crop(photos: list[Image.Image], draws: torch.Generator) -> Tensor:
    """A square of 30 to 100 % of a photograph's shorter side, as (3, SIDE, SIDE) in [-1, 1]."""
    which, size, across, down, mirrored = torch.rand(5, generator=draws).tolist()
    photo = photos[int(which * len(photos))]
    side = round((0.3 + 0.7 * size) * min(photo.size))
    left, top = round(across * (photo.width - side)), round(down * (photo.height - side))
    box = (left, top, left + side, top + side)
    return pixels(photo, box=box, size=(SIDE, SIDE), flip=mirrored < 0.5)


def _square(photo: Image.Image) -> tuple[int, int, int, int]:
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return (left, top, left + side, top + side)


if __name__ == "__main__":
    main()
