"""Compares a pipeline's images with the true ones: a sheet to look at and a distance."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from scripts.mini.images.captions import CAPTION_TOKENS, styled
from scripts.mini.images.corpus import SIDE, Corpus
from scripts.mini.images.styles import STYLES

_STEPS = 12
GUIDANCE = 2.0  # distilled; see denoiser.distill_guidance
_SHOWN = (
    "tiger face", "cat", "owl", "octopus", "red apple", "hamburger", "bicycle", "rocket", "castle", "cactus",
    "umbrella", "wrapped gift", "camera", "mushroom", "sailboat", "robot",
)  # fmt: skip


@dataclass(frozen=True)
class Prompts:
    """Captions whose images are known."""

    texts: list[str]
    pictures: Tensor  # (B, 3, 64, 64) fp32 in [0, 1]


def prompts_of(corpus: Corpus, names: Sequence[str], style: str) -> Prompts:
    """Returns the first caption of a style for each name."""
    drawn = STYLES[style]
    sprites = corpus.sprites[[corpus.index(name) for name in names]].float() / 255
    texts = [styled(name, drawn, drawn.captions[1 if style == "plain" else 0]) for name in names]
    return Prompts(texts, drawn.draw(sprites))


@torch.no_grad()
def sample(pipeline: DiffusionPipeline, texts: list[str], *, seed: int, **settings: Any) -> Tensor:
    """Returns (B, 3, 64, 64) fp32 in [0, 1] on the CPU; the settings are the pipeline's own."""
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        texts,
        height=SIDE,
        width=SIDE,
        num_inference_steps=_STEPS,
        max_sequence_length=CAPTION_TOKENS,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        **({"guidance_scale": GUIDANCE} | settings),
    ).images
    return pictures.float().cpu()


def sheet(rows: Sequence[Tensor]) -> Image.Image:
    """Returns one image of rows of equally many (B, 3, 64, 64) images."""
    grid = torch.stack(list(rows)).permute(0, 3, 1, 4, 2)
    pixels = grid.reshape(len(rows) * SIDE, -1, 3).mul(255).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.numpy())


def draw_sheet(
    pipeline: DiffusionPipeline, corpus: Corpus, *, seed: int
) -> tuple[Image.Image, dict[str, float]]:
    """Returns a sheet with a row per style, and each style's mean absolute error against the truth in [0, 1]."""
    rows: list[Tensor] = []
    distances: dict[str, float] = {}
    for style in STYLES:
        prompts = prompts_of(corpus, _SHOWN, style)
        rows.append(sample(pipeline, prompts.texts, seed=seed))
        distances[style] = (rows[-1] - prompts.pictures).abs().mean().item()
    return sheet(rows), distances
