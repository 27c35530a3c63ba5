"""From the plan and the cache to the batches that a training step sees."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from halfbyte.trainer.data.encoding_cache import LatentCache, TextCache
from halfbyte.trainer.data.order import Entry, SampleOrder
from halfbyte.trainer.randomness import uniform


@dataclass(frozen=True)
class TrainingSample:
    """One sample as the cache holds it."""

    position: int
    latent_mean: Tensor  # (C, h, w) fp32
    latent_std: Tensor  # (C, h, w) fp32
    prompt_embeds: Tensor  # (T, D)
    pooled_prompt_embeds: Tensor  # (P,)


@dataclass(frozen=True)
class Batch:
    """A process's share of one micro-batch."""

    positions: tuple[int, ...]
    latent_mean: Tensor  # (B, C, h, w) fp32
    latent_std: Tensor  # (B, C, h, w) fp32
    prompt_embeds: Tensor  # (B, T, D)
    pooled_prompt_embeds: Tensor  # (B, P)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device, without waiting for it where the memory is pinned. Called by Lightning."""
        return Batch(self.positions, *(t.to(device, non_blocking=t.is_pinned()) for t in self._tensors()))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory. Called by DataLoader(pin_memory=True)."""
        return Batch(self.positions, *(t.pin_memory() for t in self._tensors()))

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (self.latent_mean, self.latent_std, self.prompt_embeds, self.pooled_prompt_embeds)


class TrainingSet(Dataset[TrainingSample]):
    """Samples by entry of the plan; picture and caption come from the entry's one Sample, never by number."""

    def __init__(
        self, latents: LatentCache, texts: TextCache, *, caption_dropout: float = 0.0, seed: int = 0
    ) -> None:
        self._latents = latents
        self._texts = texts
        self._caption_dropout = caption_dropout
        self._seed = seed

    def dropping(self, caption_dropout: float) -> "TrainingSet":
        """The same samples, so large a share of them with an empty caption."""
        return TrainingSet(self._latents, self._texts, caption_dropout=caption_dropout, seed=self._seed)

    def __getitem__(self, entry: Entry) -> TrainingSample:
        """Raises DataError where the cache lacks the entry or cannot be read."""
        moments = self._latents.read(entry.view)
        dropped = uniform(self._seed, "caption_dropout", entry.position) < self._caption_dropout
        text = self._texts.read("" if dropped else entry.view.sample.caption)
        return TrainingSample(
            entry.position,
            moments.mean[0],
            moments.std[0],
            text.prompt_embeds[0],
            text.pooled_prompt_embeds[0],
        )


class PlannedBatches(Sampler[list[Entry]]):
    """One process's share of the plan's micro-batches `start` to `stop`: a DataLoader's batch_sampler."""

    def __init__(self, plan: SampleOrder, *, batch_size: int, rank: int, start: int, stop: int) -> None:
        self._plan = plan
        self._slice = slice(rank * batch_size, (rank + 1) * batch_size)
        self._start = start
        self._stop = stop

    def __iter__(self) -> Iterator[list[Entry]]:
        micro_batches = self._plan.micro_batches(self._start)
        return (list(entries[self._slice]) for entries in islice(micro_batches, len(self)))

    def __len__(self) -> int:
        return max(0, self._stop - self._start)


def collate(samples: Sequence[TrainingSample]) -> Batch:
    """A DataLoader's collate_fn."""
    return Batch(
        tuple(sample.position for sample in samples),
        torch.stack([sample.latent_mean for sample in samples]),
        torch.stack([sample.latent_std for sample in samples]),
        torch.stack([sample.prompt_embeds for sample in samples]),
        torch.stack([sample.pooled_prompt_embeds for sample in samples]),
    )
