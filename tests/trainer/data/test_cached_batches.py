"""Tests of batches from the cache: matching captions, positions, caption dropout, worker processes."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils.data import DataLoader

from halfbyte.trainer.data.batches import Batch, PlannedBatches, TrainingSet, collate
from halfbyte.trainer.data.cache.encodings import encode_missing
from halfbyte.trainer.data.caption_variants import variants
from halfbyte.trainer.data.sources.caption_style import CaptionStyle
from halfbyte.trainer.data.sources.reading import read_samples
from halfbyte.trainer.data.views.buckets import Cropping, View, views_of
from halfbyte.trainer.data.views.order import OrderedSet, SampleOrder
from halfbyte.trainer.recipe.data_section import DataSection

from counting_encoders import CountingEncoders, captions_of, write_pictures


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures")


class TestBatches:
    @pytest.fixture
    def groups(self, pictures: Path) -> list[tuple[View, ...]]:
        return views_of(read_samples(pictures), [Cropping(32, 16)], seed=0)

    def loaded(
        self, groups: list[tuple[View, ...]], cache: Path, caption_dropout: float = 0.0, seed: int = 0
    ) -> DataLoader[Batch]:
        views = [view for group in groups for view in group]
        latents, texts = encode_missing(cache, CountingEncoders(), views, captions_of(views))
        batches = PlannedBatches(
            SampleOrder([OrderedSet(groups, len(groups))], seed=0, global_batch=2),
            rank=0,
            processes=1,
            start=0,
            stop=24,
        )
        (given,) = DataSection(path=Path("pictures"), caption_dropout=caption_dropout).resolved_sets
        data = TrainingSet(latents, texts, [given], seed=seed)
        return DataLoader(data, batch_sampler=batches, collate_fn=collate)

    def test_latents_come_with_their_own_captions(
        self, groups: list[tuple[View, ...]], tmp_path: Path
    ) -> None:
        rows = 0
        for batch in self.loaded(groups, tmp_path / "cache"):
            for mean, prompt in zip(batch.latent_mean, batch.prompt_embeds, strict=True):
                letter = chr(int(prompt[4, 0].item()))
                assert round((mean[0, 0, 0].item() + 1) * 127.5) == 60 * "abcd".index(letter)
                rows += 1
        assert rows == 48

    def test_shapes_positions_and_order(self, groups: list[tuple[View, ...]], tmp_path: Path) -> None:
        plan = SampleOrder([OrderedSet(groups, len(groups))], seed=0, global_batch=2)
        loader = self.loaded(groups, tmp_path / "cache")
        assert len(loader) == 24
        for batch, planned in zip(loader, islice(plan.micro_batches(), 24), strict=True):
            assert batch.positions == tuple(entry.position for entry in planned)
            view = planned[0].view
            assert batch.latent_mean.shape == (2, 3, view.height // 8, view.width // 8)
            assert batch.latent_std.shape == batch.latent_mean.shape
            assert batch.prompt_embeds.shape == (2, 8, 4)
            assert batch.pooled_prompt_embeds.shape == (2, 4)

    def test_caption_dropout_is_keyed_by_position(
        self, groups: list[tuple[View, ...]], tmp_path: Path
    ) -> None:
        def dropped(caption_dropout: float, seed: int = 0) -> list[bool]:
            batches = self.loaded(groups, tmp_path / "cache", caption_dropout, seed)
            return [not row.any() for batch in batches for row in batch.prompt_embeds]

        half = dropped(caption_dropout=0.5, seed=0)
        assert 12 < sum(half) < 36
        assert dropped(caption_dropout=0.5, seed=0) == half
        assert dropped(caption_dropout=0.5, seed=1) != half
        assert not any(dropped(caption_dropout=0.0))
        assert all(dropped(caption_dropout=1.0))

    def test_caption_variants_do_not_depend_on_the_number_of_processes(
        self, pictures: Path, tmp_path: Path
    ) -> None:
        for file in pictures.glob("*.txt"):
            file.write_text("1, 2, 3, 4\n5, 6, 7, 8")
        samples = read_samples(pictures, CaptionStyle(lines=True))
        groups = views_of(samples, [Cropping(32, 16)], seed=0)
        views = [view for group in groups for view in group]
        (given,) = DataSection(path=Path("pictures"), shuffle_tags=True, caption_dropout=0.1).resolved_sets
        texts = [text for sample in samples for text in variants(sample, given, 3)]
        caches = encode_missing(tmp_path / "cache", CountingEncoders(), views, texts)
        data = TrainingSet(*caches, [given], seed=3)
        order = SampleOrder([OrderedSet(groups, len(groups))], seed=3, global_batch=2)

        def captions(processes: int, start: int = 0) -> dict[int, list[float]]:
            return {
                sample.position: sample.prompt_embeds.flatten().tolist()
                for rank in range(processes)
                for entries in PlannedBatches(order, rank=rank, processes=processes, start=start, stop=20)
                for sample in map(data.__getitem__, entries)
            }

        alone = captions(1)
        assert len(set(map(tuple, alone.values()))) > 10
        assert captions(2) == alone
        rest = captions(2, start=7)
        assert rest == {position: alone[position] for position in rest}
        assert len(rest) == 26

    def test_lightning_moves_a_batch(self, groups: list[tuple[View, ...]], tmp_path: Path) -> None:
        batch = next(iter(self.loaded(groups, tmp_path / "cache")))
        moved = move_data_to_device(batch, torch.device("meta"))
        assert isinstance(moved, Batch)
        assert moved.positions == batch.positions
        tensors = (moved.latent_mean, moved.latent_std, moved.prompt_embeds, moved.pooled_prompt_embeds)
        assert all(tensor.is_meta for tensor in tensors)

    @pytest.mark.gpu
    def test_a_pinned_batch_is_copied_correctly(self, groups: list[tuple[View, ...]], tmp_path: Path) -> None:
        plain = self.loaded(groups, tmp_path / "cache")
        pinned = DataLoader(
            plain.dataset, batch_sampler=plain.batch_sampler, collate_fn=collate, pin_memory=True
        )
        for one, other in zip(plain, pinned, strict=True):
            assert other.latent_mean.is_pinned()
            moved = other.to("cuda")
            assert moved.prompt_embeds.is_cuda
            assert torch.equal(one.latent_mean, moved.latent_mean.cpu())

    def test_worker_processes_give_the_same_batches(
        self, groups: list[tuple[View, ...]], tmp_path: Path
    ) -> None:
        in_process = self.loaded(groups, tmp_path / "cache")
        workers = DataLoader(
            in_process.dataset, batch_sampler=in_process.batch_sampler, collate_fn=collate, num_workers=2
        )
        for one, other in zip(in_process, workers, strict=True):
            assert one.positions == other.positions
            assert torch.equal(one.latent_mean, other.latent_mean)
            assert torch.equal(one.prompt_embeds, other.prompt_embeds)
