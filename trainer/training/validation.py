"""The loss on held-out pictures at fixed noise: a number that falls as a run learns, and only then.

A training loss jumps from step to step, because each step draws other pictures, noise and noise levels. Here all
three are fixed: every picture is measured at each level of a list, with noise that depends on nothing but the
picture's bytes and the level. So the number is the same for every seed, step, base and number of processes, and two
of them differ by what was learned alone. It is the plain squared error of the velocity, averaged over pictures and
levels, whatever loss, weighting and density a run trains with: that runs with different objectives compare is worth
more than that the number resembles the training loss.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfbyte.trainer.data.batches import TrainingSet, collate
from halfbyte.trainer.data.buckets import View
from halfbyte.trainer.data.order import Entry
from halfbyte.trainer.errors import HalfbyteError
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.randomness import generator
from halfbyte.trainer.runtime.world import World
from halfbyte.trainer.training.metrics import Measurement


@dataclass(frozen=True)
class Point:
    """One picture at one noise level."""

    number: int  # in the order of pictures, then of levels
    view: View
    sigma: float  # as the recipe says it


class Validation:
    """Held-out pictures, and the loss on them at a step of the run."""

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
        batch_size: int,
        world: World,
    ) -> None:
        """`pictures` reads the views' latents and captions, none of them dropped."""
        self.family = family
        self.denoiser = denoiser
        self.pictures = pictures
        self.sigmas = tuple(sigmas)
        self.guidance_scale = guidance_scale
        self.compute_dtype = compute_dtype
        self.world = world
        grid = [(view, sigma) for view in views for sigma in self.sigmas]
        points = [Point(number, view, sigma) for number, (view, sigma) in enumerate(grid)]
        # Cut before they are shared out: what stands in a batch, and so each rounding, is the same for any number
        # of processes.
        self._batches = list(_batches(points, batch_size))
        self._count = len(points)

    @property
    def count(self) -> int:
        """Pictures."""
        return self._count // len(self.sigmas)

    @torch.no_grad()
    def predictions(self) -> Iterator[tuple[list[Point], Tensor, Tensor]]:
        """This process's points in batches, each with the model's velocity and the true one, (B, C, h, w) fp32.

        Draws nothing from torch's own generators, and leaves the denoiser in the mode it was in.
        """
        training = self.denoiser.training
        self.denoiser.eval()  # no dropout
        for points in self._batches[self.world.rank :: self.world.size]:
            yield points, *self._predict(points)
        self.denoiser.train(training)

    def measure(self, step: int) -> Measurement:
        """The loss now; every process must call it, and all get the same number.

        Raises HalfbyteError where the loss is no number.
        """
        losses = torch.zeros(self._count, dtype=torch.float64)
        for points, velocity, target in self.predictions():
            per_point = F.mse_loss(velocity, target, reduction="none").flatten(1).mean(1)
            losses[[point.number for point in points]] = per_point.double().cpu()
        if self.world.size > 1:
            # Each is computed by one process and zero in the others, so the sum is exact.
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
        # To bf16, in which a model may be told sigma: every compute dtype then measures the same levels.
        sigma = torch.tensor([point.sigma for point in points], device=device).bfloat16().float()
        weight = sigma[:, None, None, None]
        noisy = (1 - weight) * latents + weight * noise
        text = TextEmbedding(batch.prompt_embeds.to(dtype), batch.pooled_prompt_embeds.to(dtype))
        # As a training step computes: the adapters are fp32, and products run in the compute dtype.
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            velocity = self.family.predict(self.denoiser, noisy.to(dtype), sigma, text, self.guidance_scale)
        return velocity.float(), noise - latents

    @staticmethod
    def _noise(point: Point, shape: torch.Size) -> Tensor:
        """(C, h, w) fp32."""
        source = generator(0, f"validation/{point.view.sample.sha256}/{point.sigma:g}")
        return torch.randn(shape, generator=source)


def _batches(points: Sequence[Point], batch_size: int) -> Iterator[list[Point]]:
    """Points in batches of one size of picture."""

    def size(point: Point) -> tuple[int, int]:
        return point.view.width, point.view.height

    for _, alike in groupby(sorted(points, key=size), key=size):
        while batch := list(islice(alike, batch_size)):
            yield batch
