"""The validation loss: the error on held-out images at fixed noise, which changes only when the model does.

The training loss jumps from step to step, because each step draws different images, noise and noise levels.
Validation fixes all three: it measures every held-out image at each noise level of a list, with noise that
depends only on the image's bytes and the level. The noise is therefore the same for every seed, step, base
and number of processes, and two validation losses differ only by what the model has learned.

The loss is the plain squared error of the velocity, averaged over images and levels, whatever loss, weighting
and timestep density the run trains with. It need not resemble the training loss, but runs with different
objectives can be compared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfbyte.trainer.data.batches import TrainingSet, collate
from halfbyte.trainer.data.views.buckets import Size, View
from halfbyte.trainer.data.views.order import Entry
from halfbyte.trainer.errors import HalfbyteError
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.randomness import generator
from halfbyte.trainer.recipe.batch_sizes import BatchSize, batch_at
from halfbyte.trainer.runtime.world import World
from halfbyte.trainer.training.metrics import Measurement


@dataclass(frozen=True)
class Point:
    """One image at one noise level."""

    number: int  # position in the list of all images, each at all levels
    view: View
    sigma: float  # as written in the recipe


class Validation:
    """Measures the loss on the held-out images at any step of the run."""

    def __init__(
        self,
        family: Family,
        denoiser: nn.Module,
        views: Sequence[View],
        pictures: TrainingSet,
        *,
        sigmas: Sequence[float],
        guidance_scale: float,
        compute_dtype: torch.dtype,
        batch_size: BatchSize,
        world: World,
    ) -> None:
        """Sorts the points into batches.

        pictures: reads the latents and captions of the views, without caption dropout.
        """
        self.family = family
        self.denoiser = denoiser
        self.pictures = pictures
        self.sigmas = tuple(sigmas)
        self.guidance_scale = guidance_scale
        self.compute_dtype = compute_dtype
        self.world = world
        grid = [(view, sigma) for view in views for sigma in self.sigmas]
        points = [Point(number, view, sigma) for number, (view, sigma) in enumerate(grid)]
        # Batches are formed first and then distributed. Each batch has the same content for any number of
        # processes, and rounds in the same way.
        self._batches = list(_batches(points, batch_size))
        self._count = len(points)

    @property
    def count(self) -> int:
        """The number of held-out images."""
        return self._count // len(self.sigmas)

    @torch.no_grad()
    def predictions(self) -> Iterator[tuple[list[Point], Tensor, Tensor]]:
        """Yields this process's batches: points, predicted and true velocity, (B, C, h, w) fp32.

        Uses none of torch's global generators, and restores the denoiser's training or evaluation mode.
        """
        training = self.denoiser.training
        self.denoiser.eval()  # no dropout
        for points in self._batches[self.world.rank :: self.world.size]:
            yield points, *self._predict(points)
        self.denoiser.train(training)

    def measure(self, step: int) -> Measurement:
        """Measures the loss now; every process must call this, and all get the same result.

        Raises:
            HalfbyteError: the loss is NaN or infinite.
        """
        losses = torch.zeros(self._count, dtype=torch.float64)
        for points, velocity, target in self.predictions():
            per_point = F.mse_loss(velocity, target, reduction="none").flatten(1).mean(1)
            losses[[point.number for point in points]] = per_point.double().cpu()
        if self.world.size > 1:
            # Every loss is computed by one process and zero in all others, so the sum is exact.
            torch.distributed.all_reduce(losses)
        by_sigma = losses.reshape(-1, len(self.sigmas)).mean(0).tolist()
        measured = Measurement(step, losses.mean().item(), dict(zip(self.sigmas, by_sigma, strict=True)))
        if not losses.isfinite().all():
            raise HalfbyteError(
                f"step {step}: the validation loss is {measured.loss} (by sigma: {measured.by_sigma}); try"
                " quant.compute_dtype: bfloat16, or a lower optimizer.lr"
            )
        return measured

    def _predict(self, points: Sequence[Point]) -> tuple[Tensor, Tensor]:
        device, dtype = self.world.device, self.compute_dtype
        batch = collate([self.pictures[Entry(point.number, point.view)] for point in points]).to(device)
        latents = self.family.scale_latents(batch.latent_mean)  # (B, C, h, w) fp32
        noise = torch.stack([self._noise(point, latents.shape[1:]) for point in points]).to(device)
        # Rounded to bf16, because the model may get sigma in bf16. Every compute dtype then measures the same
        # levels.
        sigma = torch.tensor([point.sigma for point in points], device=device).bfloat16().float()
        weight = sigma[:, None, None, None]
        noisy = (1 - weight) * latents + weight * noise
        text = TextEmbedding(batch.prompt_embeds.to(dtype), batch.pooled_prompt_embeds.to(dtype))
        # Same precision as a training step: the adapters are fp32, and products run in the compute dtype.
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            velocity = self.family.predict(self.denoiser, noisy.to(dtype), sigma, text, self.guidance_scale)
        return velocity.float(), noise - latents

    @staticmethod
    def _noise(point: Point, shape: torch.Size) -> Tensor:
        """Returns the noise of one point, (C, h, w) fp32, keyed by the image's bytes and the noise level."""
        source = generator(0, f"validation/{point.view.sample.sha256}/{point.sigma:g}")
        return torch.randn(shape, generator=source)


def _batches(points: Sequence[Point], batch_size: BatchSize) -> Iterator[list[Point]]:
    """Yields batches of points whose images and references have the same sizes."""

    def kind(point: Point) -> tuple[tuple[Size, ...], int]:
        return point.view.sizes, batch_at(batch_size, point.view.resolution)

    for (_, most), alike in groupby(sorted(points, key=kind), key=kind):
        while batch := list(islice(alike, most)):
            yield batch
