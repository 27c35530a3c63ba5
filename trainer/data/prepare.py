"""Prepares a run's data before the transformer is loaded: reads images, fills the cache, frees the encoders."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from halfbyte.trainer.data.batches import PlannedBatches, TrainingSet, collate
from halfbyte.trainer.data.cache.encodings import LatentCache, TextCache, encode_missing
from halfbyte.trainer.data.cache.masks import MaskCache
from halfbyte.trainer.data.caption_variants import all_variants
from halfbyte.trainer.data.long_captions import Place, prompt_places, warn_of_long_captions
from halfbyte.trainer.data.prefetch import PrefetchingLoader
from halfbyte.trainer.data.prompts import Prompt, references_for, refuse_placeholders
from halfbyte.trainer.data.read_sets import (
    ReadData,
    SetSummary,
    held_out_views,
    read_data,
    read_references,
    summaries,
    tables_folder,
    training_views,
)
from halfbyte.trainer.data.record import Recorded, require_same
from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.data.text_precision import choose_t5_quant
from halfbyte.trainer.data.views.buckets import Size, View
from halfbyte.trainer.data.views.order import SampleOrder
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.encoders import load_encoders
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.families.t5 import T5Setting
from halfbyte.trainer.recipe.batch_sizes import over_processes
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.device_memory import free_bytes, free_unused
from halfbyte.trainer.runtime.progress import LazyProgress
from halfbyte.trainer.runtime.workers import worker_count
from halfbyte.trainer.runtime.world import World, barrier, broadcast_from_leader, max_over_processes
from halfbyte.trainer.wording import printable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Everything that training needs apart from the transformer."""

    data: ReadData
    summaries: Sequence[SetSummary]  # one for each data set
    shapes: Sequence[tuple[int, Size]]  # resolutions and sizes that occur, in pixels
    prompts: Sequence[Prompt]
    empty: TextEmbedding  # of the empty caption, a batch of one
    preserved: TextEmbedding | None  # of objective.preserve's caption, a batch of one
    plan: SampleOrder
    training_set: TrainingSet
    held_out: Sequence[View]  # one per validation image
    held_out_set: TrainingSet
    record: Recorded  # of samples and held-out images
    texts: int  # different captions and prompts that are encoded, with all variants and the empty caption

    @property
    def sizes(self) -> list[Size]:
        """The sizes of training images that occur, in pixels; not all buckets."""
        return sorted({size for _, size in self.shapes})

    @property
    def text_bytes(self) -> int:
        """The bytes of all encoded captions in the cache."""
        return self.texts * (self.empty.prompt_embeds.nbytes + self.empty.pooled_prompt_embeds.nbytes)

    def loader(self, recipe: Recipe, world: World, first_micro_batch: int) -> PrefetchingLoader:
        """Makes the loader of this process's micro-batches, from the given one to the end of the run."""
        train = recipe.train
        batches = PlannedBatches(
            self.plan,
            rank=world.rank,
            processes=world.size,
            start=first_micro_batch,
            stop=train.steps * train.grad_accumulation,
            accumulation=train.grad_accumulation,
        )
        return PrefetchingLoader(
            self.training_set, device=world.device, batch_sampler=batches, collate_fn=collate
        )


def prepare(
    recipe: Recipe, family: Family, world: World, console: Console, *, started_on: Path | None = None
) -> Prepared:
    """Reads the data and fills the cache; each process encodes its share. Frees the encoders before it returns.

    started_on: the record of the data that a resumed run was started on.

    Raises:
        DataError: with all problems of the images and captions at once, or with what differs from `started_on`.
    """
    refuse_placeholders(recipe.sample.prompts)
    cache, preserve = recipe.data.cache_folder, recipe.objective.preserve
    is_decoded = partial(LatentCache.has_decoded, cache)
    reading = LazyProgress(console, "reading images", "image")
    data = _read(recipe, world, is_decoded, reading)
    reading.close()
    record = _record(recipe, data)
    if started_on is not None:
        require_same(started_on, record)
    references: dict[str, Sample] = {}
    if recipe.sample.references is not None:
        folder = recipe.sample.references
        found = read_references(recipe, folder, is_decoded=is_decoded)
        references = references_for(recipe.sample.prompts, found, folder)
    sets = training_views(data, family, recipe.train.seed)
    views = [view for ordered in sets for group in ordered.views for view in group]
    held_out = held_out_views(data, family, recipe.train.seed)
    masks = MaskCache(cache, family.vae_scale)
    masking = LazyProgress(console, "reading masks", "mask")
    black = masks.add_missing(
        views, workers=_workers(world, views), rank=world.rank, world_size=world.size, progress=masking
    )
    masking.close()
    if black:
        log.warning(
            "%d crops show nothing of their masks and have the same weight everywhere, the first is of %s; with"
            " masked_loss.outside: 0 nothing is learned from them",
            len(black),
            printable(black[0].sample.path),
        )
    captions = _captions(recipe, data)
    if world.is_leader:
        warn_of_long_captions(captions, family)
    latents, texts = _encode(
        recipe,
        family,
        world,
        console,
        [one for view in (*views, *held_out) for one in (view, *view.references)],
        [text for _, text in captions],
    )
    barrier(world)
    train = recipe.train
    return Prepared(
        data,
        summaries(data, sets),
        sorted({shape for one in sets for shape in one.groups.used_shapes}),
        [Prompt(text, texts.read(text), references.get(text)) for text in recipe.sample.prompts],
        texts.read(""),
        None if preserve is None else texts.read(preserve.caption),
        SampleOrder(sets, seed=train.seed, global_batch=over_processes(train.batch_size, world.size)),
        TrainingSet(latents, texts, recipe.data.resolved_sets, masks, seed=train.seed),
        held_out,
        TrainingSet(latents, texts),
        record,
        len({"", *(text for _, text in captions)}),
    )


def _encode(
    recipe: Recipe,
    family: Family,
    world: World,
    console: Console,
    views: Sequence[View],
    captions: Sequence[str],
) -> tuple[LatentCache, TextCache]:
    """Encodes this process's share of what the cache lacks, and frees the encoders."""
    cache, model = recipe.data.cache_folder, recipe.model
    encoders = load_encoders(
        family,
        device=world.device,
        dtype=torch.bfloat16,
        memo=cache / "digests",
        t5_quant=_t5_quant(recipe, family, world, captions),
        stream_t5=model.stream_text_encoder,
        vae_dtype=_VAE_DTYPES[model.vae_dtype],
    )
    encoding = LazyProgress(console, "encoding", "entry")
    latents, texts = encode_missing(
        cache,
        encoders,
        views,
        captions,
        workers=_workers(world, views),
        rank=world.rank,
        world_size=world.size,
        progress=encoding,
    )
    encoding.close()
    del encoders
    free_unused(world.device)
    return latents, texts


def _t5_quant(recipe: Recipe, family: Family, world: World, captions: Sequence[str]) -> T5Setting:
    """Returns T5's precision, which is the same in all processes."""
    model, free = recipe.model, free_bytes(world.device)
    if free is not None:
        free = -max_over_processes(world, -free)  # of the fullest device
    if model.stream_text_encoder:
        free = None  # only quantized blocks can be streamed
    return broadcast_from_leader(
        world,
        lambda: choose_t5_quant(
            model.text_encoder_quant,
            family,
            recipe.data.cache_folder,
            captions,
            dtype=torch.bfloat16,
            free=free,
        ),
    )


def _workers(world: World, views: Sequence[View]) -> int:
    """Returns the number of processes that decode images for this one. For few images, starting them takes longer."""
    return worker_count(world.local_size) if len(views) >= _DECODED_APART * world.size else 0


_DECODED_APART = 256  # images for each process
_VAE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _captions(recipe: Recipe, data: ReadData) -> list[tuple[Place, str]]:
    """Returns all texts that the run encodes, with the image or setting that each belongs to."""
    trained = [
        (sample.path, text)
        for read in data.sets
        for sample, text in all_variants(read.samples, read.settings, recipe.train.seed)
    ]
    held_out = [(sample.path, sample.caption) for sample in data.held_out_samples]
    preserve = recipe.objective.preserve
    preserved: list[tuple[Place, str]] = (
        [] if preserve is None else [("objective.preserve.caption", preserve.caption)]
    )
    return [*trained, *held_out, *preserved, *prompt_places(recipe.sample.prompts)]


def _record(recipe: Recipe, data: ReadData) -> Recorded:
    """Returns the record of all samples: the training samples in the order of the sets, then those held out."""
    trained = [(read.samples, read.root, False) for read in data.sets]
    roots = [read.root for read in data.sets]
    if recipe.validation.path is not None:
        roots = [recipe.validation.path]
    return Recorded([*trained, *((own, root, True) for own, root in zip(data.held_out, roots, strict=True))])


def _read(
    recipe: Recipe, world: World, is_decoded: Callable[[str], bool], progress: LazyProgress
) -> ReadData:
    """Reads the data: first in the leader, so that the other processes find the tables that it wrote."""
    read = partial(
        read_data,
        recipe,
        is_decoded=is_decoded,
        tables=tables_folder(recipe.data.cache_folder),
        progress=progress,
    )
    own: list[ReadData] = []
    broadcast_from_leader(world, lambda: own.append(read()))
    return own[0] if own else read()
