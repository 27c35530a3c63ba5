"""Generates sample images with the stock pipeline, so that training shows what inference will give."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from halfbyte.trainer.data.pictures.decode import decode
from halfbyte.trainer.data.prompts import Prompt
from halfbyte.trainer.data.sources.contents import unchanged_pictures
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.stock_parts import load_vae, stock_pipeline


@dataclass(frozen=True)
class Drawn:
    """The images of a prompt at two steps of a run, with its reference; all RGB and of one size."""

    prompt: str
    base: Image.Image
    trained: Image.Image
    reference: Image.Image | None


@dataclass(frozen=True)
class PictureSettings:
    """The settings with which the pipeline is called."""

    steps: int
    guidance_scale: float
    width: int  # pixels
    height: int  # pixels


@dataclass(frozen=True)
class SampleSettings(PictureSettings):
    """The settings for the sample images of a run."""

    seed: int


@dataclass(frozen=True)
class PipelineCall:
    """The stock pipeline with all inputs except the prompt and the noise."""

    family: Family
    pipeline: Any
    empty: TextEmbedding  # of the empty caption, for classifier-free guidance
    settings: PictureSettings
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def draw(
        self,
        text: TextEmbedding,
        seed: int,
        *,
        output_type: str = "pil",
        on_step: Callable[[Tensor], None] = lambda latents: None,
    ) -> Any:
        """Generates one image; with output_type `latent`, returns the pipeline's latents without the batch dimension.

        Args:
            on_step: called after each step with the latents, in the pipeline's own layout.
        """

        def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(tensors["latents"])
            return tensors

        inputs = {
            name: tensor.to(self.device, self.dtype)
            for name, tensor in self.family.sampling_inputs(text, self.empty).items()
        }
        return self.pipeline(
            **inputs,
            width=self.settings.width,
            height=self.settings.height,
            num_inference_steps=self.settings.steps,
            guidance_scale=self.settings.guidance_scale,
            # A CPU generator, so that the noise is the same on all devices.
            generator=torch.Generator().manual_seed(seed),
            output_type=output_type,
            callback_on_step_end=after_step,
        ).images[0]


class PictureSampler:
    """Generates and stores the images of the recipe's prompts at steps of the run."""

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
        """Writes one image per prompt and returns their paths. Prompt n uses seed + n.

        The VAE is loaded for the call and freed afterwards.
        """
        if not self.prompts:
            return []
        pipeline = stock_pipeline(
            self.family, transformer=self.denoiser, vae=load_vae(self.family, self.dtype, self.device)
        )
        pipeline.set_progress_bar_config(disable=True)
        call = PipelineCall(self.family, pipeline, self.empty, self.settings, self.device, self.dtype)
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for place, prompt in enumerate(self.prompts):
            picture: Image.Image = call.draw(prompt.embedding, self.settings.seed + place)
            picture.save(self._path(step, place))
            paths.append(self._path(step, place))
        return paths

    def drawn(self, before: int, after: int) -> list[Drawn]:
        """Reads the images of two steps of the run from their files; an empty list if any is missing.

        Reference images that are gone or have changed since the run was started are left out with a warning.
        """
        rows = []
        for place, prompt in enumerate(self.prompts):
            stages = [self._path(step, place) for step in (before, after)]
            if not all(stage.is_file() for stage in stages):
                return []
            base, trained = (decode(stage.read_bytes()) for stage in stages)
            reference = None
            if prompt.reference is not None:
                (picture,) = unchanged_pictures(
                    [prompt.reference], None, "the comparison with sample.references"
                )
                if picture is not None:
                    reference = ImageOps.fit(picture, trained.size, Image.Resampling.LANCZOS)
            rows.append(Drawn(prompt.text, base, trained, reference))
        return rows

    def _path(self, step: int, place: int) -> Path:
        return self.folder / f"step-{step:06d}-{place:02d}.png"
