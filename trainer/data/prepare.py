"""Prepares a run's data before the transformer is loaded: reads images, fills the cache, frees the encoders."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.data import DataLoader

from halfbyte.trainer.data.batches import PlannedBatches, TrainingSample, TrainingSet, collate
from halfbyte.trainer.data.cache.encodings import LatentCache, encode_missing
from halfbyte.trainer.data.held_out import refuse_trained, set_aside
from halfbyte.trainer.data.prompts import Prompt, references_for
from halfbyte.trainer.data.record import RecordedSample, recorded, require_same
from halfbyte.trainer.data.sources.folder import Sample, read_samples
from halfbyte.trainer.data.views.buckets import Cropping, Size, View, views_of
from halfbyte.trainer.data.views.order import SampleOrder
from halfbyte.trainer.families.embedding import TextEmbedding
from halfbyte.trainer.families.encoders import load_encoders
from halfbyte.trainer.families.family import Family
from halfbyte.trainer.recipe.recipe import Recipe
from halfbyte.trainer.runtime.device_memory import free_unused
from halfbyte.trainer.runtime.progress import LazyProgress
from halfbyte.trainer.runtime.world import World, barrier


@dataclass(frozen=True)
class Prepared:
    """Everything that training needs apart from the transformer."""

    samples: Sequence[Sample]  # the training samples
    views: int  # the number of training views
    sizes: Sequence[Size]  # the sizes that occur, not all buckets
    prompts: Sequence[Prompt]
    empty: TextEmbedding  # of the empty caption, a batch of one
    plan: SampleOrder
    training_set: TrainingSet
    held_out: Sequence[View]  # one per validation image
    held_out_set: TrainingSet
    record: Sequence[RecordedSample]  # of samples and held-out images

    def loader(self, recipe: Recipe, world: World, first_micro_batch: int) -> DataLoader[TrainingSample]:
        """Makes the loader of this process's micro-batches, from the given one to the end of the run."""
        train = recipe.train
        batches = PlannedBatches(
            self.plan,
            batch_size=train.batch_size,
            rank=world.rank,
            start=first_micro_batch,
            stop=train.steps * train.grad_accumulation,
        )
        return DataLoader(
            self.training_set,
            batch_sampler=batches,
            collate_fn=collate,
            pin_memory=world.device.type == "cuda",
        )


def prepare(
    recipe: Recipe, family: Family, world: World, console: Console, *, started_on: Path | None = None
) -> Prepared:
    """Reads the data and fills the cache; each process encodes its share. Frees the encoders before it returns.

    started_on: the record of the data that a resumed run was started on.

    Raises:
        DataError: with all problems of the images and captions at once, or with what differs from `started_on`.
    """
    data = recipe.data
    reading = LazyProgress(console, "reading images", "image")
    samples = _read(recipe, data.path, reading)
    reading.close()
    samples, held_out = _split(recipe, samples)
    record = [
        *recorded(samples, data.path, held_out=False),
        *recorded(held_out, recipe.validation.path or data.path, held_out=True),
    ]
    if started_on is not None:
        require_same(started_on, record)
    references = _references(recipe)
    cropping = Cropping(
        data.resolution, family.size_multiple, data.aspect_buckets, data.crop, data.random_crops, data.flip
    )
    groups = views_of(samples, cropping, recipe.train.seed)
    views = [view for group in groups for view in group]
    # Validation measures one center crop per image, so that results do not depend on how training crops.
    center = replace(cropping, crop="center", random_crops=1, flip=False)
    held_out_views = [group[0] for group in views_of(held_out, center, recipe.train.seed)]
    encoding = LazyProgress(console, "encoding", "entry")
    encoders = load_encoders(
        family,
        device=world.device,
        dtype=torch.bfloat16,
        memo=data.cache_folder / "digests",
        t5_quant=recipe.model.text_encoder_quant,
        stream_t5=recipe.model.stream_text_encoder,
    )
    latents, texts = encode_missing(
        data.cache_folder,
        encoders,
        [*views, *held_out_views],
        [*(sample.caption for sample in (*samples, *held_out)), *recipe.sample.prompts],
        rank=world.rank,
        world_size=world.size,
        progress=encoding,
    )
    encoding.close()
    del encoders
    free_unused(world.device)
    barrier(world)
    train = recipe.train
    return Prepared(
        samples,
        len(views),
        sorted({(view.width, view.height) for view in views}),
        [Prompt(text, texts.read(text), references.get(text)) for text in recipe.sample.prompts],
        texts.read(""),
        SampleOrder(groups, seed=train.seed, global_batch=train.batch_size * world.size),
        TrainingSet(latents, texts, caption_dropout=data.caption_dropout, seed=train.seed),
        held_out_views,
        TrainingSet(latents, texts),
        record,
    )


def _split(recipe: Recipe, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Returns the samples to train on and those for validation. Raises DataError if they overlap or too few remain."""
    validation = recipe.validation
    if validation.path is None:
        return set_aside(samples, validation.held_out)
    held_out = _read(recipe, validation.path)
    refuse_trained(held_out, samples)
    return samples, held_out


def _references(recipe: Recipe) -> dict[str, Sample]:
    """Reads the reference images of the sample prompts, by prompt. Raises DataError for unusable images."""
    folder = recipe.sample.references
    if folder is None:
        return {}
    return references_for(recipe.sample.prompts, _read(recipe, folder), folder)


def _read(recipe: Recipe, folder: Path, progress: LazyProgress | None = None) -> list[Sample]:
    """Reads the samples of a folder. Raises DataError for unusable images."""
    data = recipe.data
    return read_samples(
        folder,
        data.caption_prefix,
        is_decoded=lambda sha256: LatentCache.has_decoded(data.cache_folder, sha256),
        progress=progress,
    )
