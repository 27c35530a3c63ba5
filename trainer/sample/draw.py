"""Generates a list of images: first the latents of all with the transformer, then the images with the VAE.

The transformer is freed before the VAE is loaded, so that they never share device memory. Only an offloaded pipeline
holds both, and then yields each image as soon as it is finished.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from halfbyte.trainer.cuda_graphs.forward import NewRecorder, recorded_forwards
from halfbyte.trainer.denoiser.base import load_base
from halfbyte.trainer.denoiser.load import keep_exact
from halfbyte.trainer.errors import RecipeError
from halfbyte.trainer.families.blocks.fused_block import BlockSettings
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.stock_parts import load_vae, stock_pipeline
from halfbyte.trainer.runtime.device_memory import free_unused
from halfbyte.trainer.runtime.placement import Placement
from halfbyte.trainer.sample.picture_files import Job
from halfbyte.trainer.sample.sampler import PictureSettings, PipelineCall
from halfbyte.trainer.sample.source import Subject
from halfbyte.trainer.sample.strength import AdapterStrength, put_on

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawing:
    """Everything that images are generated with, apart from the jobs."""

    subject: Subject
    settings: PictureSettings
    placement: Placement
    attention: str
    compiled: bool
    recorder: NewRecorder | None  # None: kernels are launched one by one, without CUDA graphs
    texts: Mapping[str, TextEmbedding]  # by prompt, including the empty one
    console: Console

    def pictures(self, jobs: Sequence[Job], on_step: Callable[[], None]) -> Iterator[tuple[Job, Image.Image]]:
        """Yields the images in the order of the jobs. After Ctrl-C the finished images are still yielded."""
        if self.placement.holds_all:
            yield from self._drawn(jobs, on_step, "pil")
            return
        latents = list(self._drawn(jobs, on_step, "latent"))
        free_unused(self.placement.device)
        yield from self._decoded(latents)

    def _drawn(
        self, jobs: Sequence[Job], on_step: Callable[[], None], output_type: str
    ) -> Iterator[tuple[Job, Any]]:
        """Yields latents on the CPU, or for the output type `pil` images."""
        subject = self.subject
        denoiser = self._load()
        strength = None if subject.adapter is None else AdapterStrength(denoiser)
        call = PipelineCall(
            subject.family,
            self._pipeline(denoiser),
            self.texts[""],
            self.settings,
            self.placement.device,
            subject.dtype,
        )
        set_to = None
        recorder = self.recorder
        try:
            with nullcontext() if recorder is None else recorded_forwards(denoiser, recorder):
                for job in jobs:
                    if strength is not None and job.strength is not None and job.strength != set_to:
                        strength.set(job.strength)
                        set_to = job.strength
                    text = self.texts[job.prompt]
                    last = _LastLatents(on_step)
                    drawn = call.draw(text, job.seed, output_type=output_type, on_step=last.after)
                    last.require_finite(job)
                    yield job, drawn.cpu() if isinstance(drawn, Tensor) else drawn
        except KeyboardInterrupt:
            log.warning("interrupted; the images generated so far are kept")

    def _load(self) -> nn.Module:
        """Loads the transformer with the adapter, and fuses or compiles its blocks."""
        subject, family = self.subject, self.subject.family
        denoiser = load_base(
            family,
            subject.quant,
            device=self.placement.loads_on,
            dtype=subject.dtype,
            console=self.console,
            cache_folder=subject.cache_folder if subject.cache_base else None,
        )
        keep_exact(family, denoiser, subject.exact)
        if subject.adapter is not None:
            put_on(denoiser, subject.adapter, subject.adapter.name)
        family.fuse_blocks(denoiser, BlockSettings("inputs", backend=self.attention))
        if self.compiled:
            compile_blocks(denoiser, family)
        return denoiser.eval()

    def _pipeline(self, denoiser: nn.Module) -> Any:
        """Loads and places the stock pipeline, without text encoders, and without the VAE if that is loaded later."""
        family = self.subject.family
        vae = None
        if self.placement.holds_all:
            vae = load_vae(family, self.subject.dtype, torch.device("cpu"))
        pipeline = stock_pipeline(family, transformer=denoiser, vae=vae)
        # Without a VAE the pipeline would guess this factor.
        pipeline.vae_scale_factor = family.vae_scale
        pipeline.set_progress_bar_config(disable=True)
        self.placement.place(pipeline)
        return pipeline

    @torch.no_grad()
    def _decoded(self, latents: Sequence[tuple[Job, Tensor]]) -> Iterator[tuple[Job, Image.Image]]:
        """Loads the VAE and decodes the latents one by one."""
        if not latents:
            return
        family, device = self.subject.family, self.placement.device
        vae: Any = load_vae(family, self.subject.dtype, device)
        processor = VaeImageProcessor(vae_scale_factor=family.vae_scale)
        for job, drawn in latents:
            decodable = family.decodable(
                drawn[None].to(device), height=self.settings.height, width=self.settings.width
            )
            decoded = vae.decode(decodable, return_dict=False)[0]
            yield job, processor.postprocess(decoded, output_type="pil")[0]


class _LastLatents:
    """Keeps the latents of an image's latest sampling step, to check them for NaN and infinity."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        self._on_step = on_step
        self._latents: Tensor | None = None

    def after(self, latents: Tensor) -> None:
        """Records the latents after a step and reports the step."""
        self._on_step()
        self._latents = latents

    def require_finite(self, job: Job) -> None:
        """Raises RecipeError if the latents contain NaN or infinity, from which no image can be decoded."""
        assert self._latents is not None
        if not self._latents.isfinite().all():
            scaled = "" if job.strength is None else f" at strength {job.strength:g}"
            raise RecipeError(
                f"prompt {job.place}, seed {job.seed}{scaled}: the transformer predicted NaN or infinity; try a"
                " smaller --strength (0 turns the adapter off), or --dtype float32"
            )


def describe_base(subject: Subject) -> str:
    """Describes the base's quantization and precision, such as `nf4, computed in bfloat16`."""
    dtype = str(subject.dtype).removeprefix("torch.")
    return f"{'not quantized' if subject.quant is None else subject.quant.quant_type}, computed in {dtype}"


# torch compiles a block again for each class of block, with and without adapters on a layer, and with adapters turned
# off. By default it gives up after eight versions, which is an error with fullgraph=True.
_VARIANTS = 64


def compile_blocks(denoiser: nn.Module, family: Family) -> None:
    """Makes torch compile every block as one graph on its first call, like diffusers' `compile_repeated_blocks`.

    That method needs a list of classes that diffusers' SD3 does not have, so this uses the family's own list. The model
    around the blocks is not compiled, because compiled code rounds the timestep differently.
    """
    torch._dynamo.config.recompile_limit = max(_VARIANTS, torch._dynamo.config.recompile_limit)
    for kind in family.block_kinds():
        for block in kind:
            denoiser.get_submodule(block).compile(fullgraph=True)
