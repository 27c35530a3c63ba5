"""Sample pictures, drawn with the stock pipeline's own sampler so that training shows what inference will."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from halfbyte.trainer.families.base import Family, TextEmbedding


@dataclass(frozen=True)
class Prompt:
    """A caption to draw, embedded before the text encoders left."""

    text: str
    embedding: TextEmbedding  # batch of one


@dataclass(frozen=True)
class SampleSettings:
    """How the pipeline is called."""

    steps: int
    guidance_scale: float
    width: int  # pixels
    height: int
    seed: int


class PictureSampler:
    """Draws the recipe's prompts at a step of the run, and sets the stages side by side."""

    def __init__(
        self,
        family: Family,
        denoiser: nn.Module,
        prompts: Sequence[Prompt],
        empty: TextEmbedding,
        settings: SampleSettings,
        *,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.family = family
        self.denoiser = denoiser
        self.prompts = prompts
        self.empty = empty
        self.settings = settings
        self.folder = folder
        self.device = device
        self.dtype = dtype

    @torch.no_grad()
    def draw(self, step: int) -> list[Path]:
        """Writes one picture a prompt, its place in the list added to the seed. The VAE comes and goes."""
        if not self.prompts:
            return []
        absent: dict[str, Any] = dict.fromkeys(self.family.text_components)
        pipeline: Any = self.family.pipeline_class.from_pretrained(
            self.family.source.folder, transformer=self.denoiser, dtype=self.dtype, **absent
        )
        pipeline.vae.to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for place, prompt in enumerate(self.prompts):
            inputs = {
                name: tensor.to(self.device, self.dtype)
                for name, tensor in self.family.sampling_inputs(prompt.embedding, self.empty).items()
            }
            picture: Image.Image = pipeline(
                **inputs,
                width=self.settings.width,
                height=self.settings.height,
                num_inference_steps=self.settings.steps,
                guidance_scale=self.settings.guidance_scale,
                # On the CPU, so that every device starts from the same noise.
                generator=torch.Generator().manual_seed(self.settings.seed + place),
            ).images[0]
            picture.save(self._path(step, place))
            paths.append(self._path(step, place))
        return paths

    def compare(self, before: int, after: int, path: Path) -> Path | None:
        """A picture of two stages, prompts down and stages across; None where a stage was not drawn."""
        rows = []
        for place, prompt in enumerate(self.prompts):
            stages = [self._path(step, place) for step in (before, after)]
            if not all(stage.is_file() for stage in stages):
                return None
            rows.append((prompt.text, [Image.open(stage).convert("RGB") for stage in stages]))
        if not rows:
            return None
        comparison(rows, ["base", f"base + LoRA, step {after}"]).save(path)
        return path

    def _path(self, step: int, place: int) -> Path:
        return self.folder / f"step-{step:06d}-{place:02d}.png"


def comparison(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str]) -> Image.Image:
    """A labelled grid: a prompt a row, a stage of the run a column. Small pictures are enlarged to be seen."""
    width, height = rows[0][1][0].size
    scale = max(1, 192 // max(width, height))
    width, height = width * scale, height * scale
    font = ImageFont.load_default(14)
    margin, line = 8, 22
    sheet_size = (
        margin + len(columns) * (width + margin),
        margin + line + len(rows) * (line + height + margin),
    )
    sheet = Image.new("RGB", sheet_size, "white")
    pen = ImageDraw.Draw(sheet)
    for place, title in enumerate(columns):
        pen.text((margin + place * (width + margin), margin), title, fill="black", font=font)
    for row, (text, pictures) in enumerate(rows):
        top = margin + line + row * (line + height + margin)
        pen.text((margin, top), _fitted(text, font, sheet_size[0] - 2 * margin), fill="black", font=font)
        for place, picture in enumerate(pictures):
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (margin + place * (width + margin), top + line))
    return sheet


def _fitted(text: str, font: Any, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
