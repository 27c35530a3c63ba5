"""Makes training batches from the order of samples and the cached encodings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from halfbyte.trainer.data.cache.encodings import LatentCache, TextCache
from halfbyte.trainer.data.views.order import Entry, SampleOrder
from halfbyte.trainer.randomness import uniform


@dataclass(frozen=True)
class TrainingSample:
    """The cached latents and text embedding of one sample, without a batch dimension."""

    position: int  # in the whole run over all processes, the key of the sample's random numbers
    latent_mean: Tensor  # (C, h, w) fp32
    latent_std: Tensor  # (C, h, w) fp32
    prompt_embeds: Tensor  # (T, D)
    pooled_prompt_embeds: Tensor  # (P,)


@dataclass(frozen=True)
class Batch:
    """One process's share of a micro-batch: B samples of one size."""

    positions: tuple[int, ...]
    latent_mean: Tensor  # (B, C, h, w) fp32
    latent_std: Tensor  # (B, C, h, w) fp32
    prompt_embeds: Tensor  # (B, T, D)
    pooled_prompt_embeds: Tensor  # (B, P)

    def to(self, device: torch.device | str) -> "Batch":
        """Copies the batch to a device, asynchronously if its memory is pinned. Lightning calls this."""
        return Batch(self.positions, *(t.to(device, non_blocking=t.is_pinned()) for t in self._tensors()))

    def pin_memory(self) -> "Batch":
        """Copies the batch to page-locked memory. DataLoader(pin_memory=True) calls this."""
        return Batch(self.positions, *(t.pin_memory() for t in self._tensors()))

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (self.latent_mean, self.latent_std, self.prompt_embeds, self.pooled_prompt_embeds)


class TrainingSet(Dataset[TrainingSample]):
    """Training samples, indexed by the entries of a SampleOrder.

    Latents and text are both looked up from the entry's Sample, so an image cannot get another image's caption.
    """

    def __init__(
        self, latents: LatentCache, texts: TextCache, *, caption_dropout: float = 0.0, seed: int = 0
    ) -> None:
        self._latents = latents
        self._texts = texts
        self._caption_dropout = caption_dropout
        self._seed = seed

    def dropping(self, caption_dropout: float) -> "TrainingSet":
        """Returns the same samples with another share of empty captions, from 0 to 1."""
        return TrainingSet(self._latents, self._texts, caption_dropout=caption_dropout, seed=self._seed)

    def __getitem__(self, entry: Entry) -> TrainingSample:
        """Reads one sample from the cache. Raises DataError if its entry is missing or unreadable."""
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
    """Yields one process's share of micro-batches `start` to `stop` (exclusive). Used as DataLoader's batch_sampler."""

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
    """Stacks samples of one size into a batch. Used as DataLoader's collate_fn."""
    return Batch(
        tuple(sample.position for sample in samples),
        torch.stack([sample.latent_mean for sample in samples]),
        torch.stack([sample.latent_std for sample in samples]),
        torch.stack([sample.prompt_embeds for sample in samples]),
        torch.stack([sample.pooled_prompt_embeds for sample in samples]),
    )
