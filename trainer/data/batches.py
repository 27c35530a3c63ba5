"""Makes training batches from the order of samples and the cached encodings."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from halfbyte.trainer.data.cache.encodings import LatentCache, TextCache
from halfbyte.trainer.data.cache.masks import MaskCache
from halfbyte.trainer.data.caption_variants import text_at
from halfbyte.trainer.data.views.buckets import View
from halfbyte.trainer.data.views.order import Entry, SampleOrder
from halfbyte.trainer.recipe.data_section import DataSet


@dataclass(frozen=True)
class TrainingSample:
    """The cached latents and text embedding of one sample, without a batch dimension."""

    position: int  # in the whole run over all processes, the key of the sample's random numbers
    latent_mean: Tensor  # (C, h, w) fp32
    latent_std: Tensor  # (C, h, w) fp32
    prompt_embeds: Tensor  # (T, D)
    pooled_prompt_embeds: Tensor  # (P,)
    loss_weight: float = 1.0
    pixel_weight: Tensor | None = None  # (1, h, w) fp32 from 0 to 1, of each latent cell in the loss; None: 1
    share: float = 1.0  # factor of its micro-batch's mean loss, see `PlannedBatches`
    references: tuple[Tensor, ...] = ()  # of each reference image (C, h, w) fp32, of its own size


@dataclass(frozen=True)
class Batch:
    """One process's part of a micro-batch: B samples whose images and references have the same sizes."""

    positions: tuple[int, ...]
    latent_mean: Tensor  # (B, C, h, w) fp32
    latent_std: Tensor  # (B, C, h, w) fp32
    prompt_embeds: Tensor  # (B, T, D)
    pooled_prompt_embeds: Tensor  # (B, P)
    loss_weight: Tensor | None = None  # (B,) fp32, factors of the samples' losses; None: 1 for all
    pixel_weight: Tensor | None = None  # (B, 1, h, w) fp32 from 0 to 1, weights of latent cells; None: 1
    share: float = 1.0  # factor of the mean loss, see `PlannedBatches`
    references: tuple[Tensor, ...] = ()  # means of the reference images' posteriors, each (B, C, h, w) fp32

    def to(self, device: torch.device | str) -> "Batch":
        """Copies the batch to a device, asynchronously if its memory is pinned. Lightning calls this."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> "Batch":
        """Copies the batch to page-locked memory. DataLoader(pin_memory=True) calls this."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, references=tuple(map(change, self.references)), **tensors)


class TrainingSet(Dataset[TrainingSample]):
    """Training samples, indexed by the entries of a SampleOrder.

    Latents and text are both looked up from the entry's Sample, so an image cannot get another image's caption.
    """

    def __init__(
        self,
        latents: LatentCache,
        texts: TextCache,
        sets: Sequence[DataSet] = (),
        masks: MaskCache | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """`sets` are the data sets of the samples, `masks` their masks.

        Without sets, captions do not vary and all losses count alike; without masks, all parts of the images do.
        """
        self._masks = masks
        self._latents = latents
        self._texts = texts
        self._sets = sets
        self._seed = seed

    def dropping(self, least: float) -> "TrainingSet":
        """Returns the same samples with a share of at least `least` (0 to 1) of empty captions."""
        sets = [replace(given, caption_dropout=max(given.caption_dropout, least)) for given in self._sets]
        return TrainingSet(self._latents, self._texts, sets, self._masks, seed=self._seed)

    def __getitem__(self, entry: Entry) -> TrainingSample:
        """Reads one sample from the cache. Raises DataError if its entry is missing or unreadable."""
        sample = entry.view.sample
        given = self._sets[sample.data_set] if self._sets else None
        moments = self._latents.read(entry.view)
        caption = sample.caption if given is None else text_at(sample, given, self._seed, entry.position)
        text = self._texts.read(caption)
        return TrainingSample(
            entry.position,
            moments.mean[0],
            moments.std[0],
            text.prompt_embeds[0],
            text.pooled_prompt_embeds[0],
            1.0 if given is None else given.loss_weight,
            self._pixel_weight(entry.view, given),
            entry.share,
            # The mode of the posterior, which is its mean: as FLUX.1 Kontext and FLUX.2 encode references.
            tuple(self._latents.read(reference).mean[0] for reference in entry.view.references),
        )

    def _pixel_weight(self, view: View, given: DataSet | None) -> Tensor | None:
        if self._masks is None or given is None or view.sample.mask is None:
            return None
        outside = given.masked_loss.outside
        return (outside + (1 - outside) * self._masks.read(view))[None]


class PlannedBatches(Sampler[list[Entry]]):
    """Yields one process's part of micro-batches `start` to `stop` (exclusive). Used as DataLoader's batch_sampler.

    Each process takes the same number of samples of a micro-batch. The micro-batches of an optimizer step may have
    different numbers of samples, n(1) to n(A). The gradient of a step is the mean over its micro-batches, so the mean
    loss of micro-batch i gets the factor `share`, n(i) / ((n(1) + ... + n(A)) / A). Every sample of the step then
    counts alike, as in one batch of all of them.
    """

    def __init__(
        self,
        plan: SampleOrder,
        *,
        rank: int,
        processes: int,
        start: int,
        stop: int,
        accumulation: int = 1,
    ) -> None:
        """`accumulation` is the number of micro-batches of an optimizer step; `start` is the first one of a step."""
        self._plan = plan
        self._rank = rank
        self._processes = processes
        self._start = start
        self._stop = stop
        self._accumulation = accumulation

    def __iter__(self) -> Iterator[list[Entry]]:
        micro_batches = islice(self._plan.micro_batches(self._start), len(self))
        while step := list(islice(micro_batches, self._accumulation)):
            samples = sum(map(len, step))
            for entries in step:
                share = len(entries) * len(step) / samples
                yield [replace(entry, share=share) for entry in self._own(entries)]

    def _own(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Returns this process's part of a micro-batch."""
        assert len(entries) % self._processes == 0, "a micro-batch has the same part for each process"
        part = len(entries) // self._processes
        return entries[self._rank * part : (self._rank + 1) * part]

    def __len__(self) -> int:
        return max(0, self._stop - self._start)


def collate(samples: Sequence[TrainingSample]) -> Batch:
    """Stacks samples into a batch; all have the same sizes. Used as DataLoader's collate_fn."""
    return Batch(
        tuple(sample.position for sample in samples),
        torch.stack([sample.latent_mean for sample in samples]),
        torch.stack([sample.latent_std for sample in samples]),
        torch.stack([sample.prompt_embeds for sample in samples]),
        torch.stack([sample.pooled_prompt_embeds for sample in samples]),
        _loss_weight(samples),
        _pixel_weight(samples),
        samples[0].share,
        tuple(map(torch.stack, zip(*(sample.references for sample in samples), strict=True))),
    )


def _loss_weight(samples: Sequence[TrainingSample]) -> Tensor | None:
    weights = [sample.loss_weight for sample in samples]
    return None if set(weights) == {1.0} else torch.tensor(weights, dtype=torch.float32)


def _pixel_weight(samples: Sequence[TrainingSample]) -> Tensor | None:
    if all(sample.pixel_weight is None for sample in samples):
        return None
    whole = torch.ones(1, *samples[0].latent_mean.shape[1:])
    return torch.stack([whole if sample.pixel_weight is None else sample.pixel_weight for sample in samples])
