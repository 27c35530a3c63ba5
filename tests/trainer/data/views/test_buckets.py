"""Tests of buckets, crops and the order of samples: exact properties over many shapes and batch sizes."""

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.trainer.data.batches import PlannedBatches
from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.data.views.buckets import Cropping, bucket_sizes, nearest_size, views_of
from halfbyte.trainer.data.views.order import Entry, OrderedSet, SampleOrder
from halfbyte.trainer.errors import RecipeError

SHAPES = [(640, 480)] * 7 + [(480, 640)] * 5 + [(500, 500)] * 3 + [(300, 900)]


def samples(shapes: list[tuple[int, int]]) -> list[Sample]:
    return [
        Sample(n, Path(f"{n}.png"), f"caption {n}", *shape, f"{n:064x}") for n, shape in enumerate(shapes)
    ]


def plan_of(
    shapes: list[tuple[int, int]], global_batch: int, seed: int = 0, **cropping: object
) -> SampleOrder:
    views = views_of(samples(shapes), [Cropping(64, 16, **cropping)], seed)
    return SampleOrder([OrderedSet(views, len(views))], seed=seed, global_batch=global_batch)


class TestSizes:
    @pytest.mark.parametrize(
        ("resolution", "multiple", "step"), [(1024, 16, 64), (512, 16, 32), (64, 16, 16), (1008, 16, 48)]
    )
    def test_sizes_suit_the_model_and_do_not_exceed_the_square(
        self, resolution: int, multiple: int, step: int
    ) -> None:
        sizes = bucket_sizes(resolution, multiple)
        assert (resolution, resolution) in sizes
        for width, height in sizes:
            assert width % multiple == 0
            assert height % multiple == 0
            assert 0.8 * resolution**2 <= width * height <= resolution**2
            assert (height, width) in sizes
            assert width % step == 0 or width == resolution

    def test_common_aspect_ratios_at_1024(self) -> None:
        sizes = bucket_sizes(1024, 16)
        assert nearest_size(4000, 3000, sizes) == (1152, 896)
        assert nearest_size(3000, 4000, sizes) == (896, 1152)
        assert nearest_size(6000, 4000, sizes) == (1216, 832)
        assert nearest_size(1920, 1080, sizes) == (1344, 768)
        assert nearest_size(777, 777, sizes) == (1024, 1024)
        assert nearest_size(10000, 100, sizes) == (2048, 512)

    @given(width=st.integers(1, 5000), height=st.integers(1, 5000))
    def test_no_other_size_keeps_more_of_the_image(self, width: int, height: int) -> None:
        sizes = bucket_sizes(1024, 16)

        def kept(size: tuple[int, int]) -> float:
            return min(size[0] * height, size[1] * width) / max(size[0] * height, size[1] * width)

        assert kept(nearest_size(width, height, sizes)) >= max(map(kept, sizes)) - 1e-5

    def test_without_buckets_the_only_size_is_square(self) -> None:
        assert Cropping(64, 16, aspect_buckets=False).sizes() == [(64, 64)]

    @pytest.mark.parametrize("resolution", [8, 1000])
    def test_a_resolution_the_model_does_not_support_is_refused(self, resolution: int) -> None:
        with pytest.raises(RecipeError, match=rf"data\.resolution: got {resolution}, .*multiple of 16"):
            Cropping(resolution, 16)


class TestViews:
    @given(
        width=st.integers(1, 3000),
        height=st.integers(1, 3000),
        crop=st.sampled_from(["center", "random"]),
        buckets=st.booleans(),
    )
    def test_boxes_lie_inside_with_the_aspect_ratio_of_the_size(
        self, width: int, height: int, crop: str, buckets: bool
    ) -> None:
        cropping = Cropping(256, 16, aspect_buckets=buckets, crop=crop, random_crops=3)
        (views,) = views_of(samples([(width, height)]), [cropping], seed=5)
        for view in views:
            left, top, right, bottom = view.box
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert right - left == width or bottom - top == height, "the largest possible box"
            error = (right - left) - (bottom - top) * view.width / view.height
            assert abs(error) <= 0.5 + 0.5 * view.width / view.height
            assert (view.width, view.height) == (views[0].width, views[0].height)

    def test_a_centered_crop(self) -> None:
        ((view,),) = views_of(samples([(300, 100)]), [Cropping(64, 16, aspect_buckets=False)], seed=0)
        assert view.box == (100, 0, 200, 100)
        assert (view.width, view.height, view.flip) == (64, 64, False)

    def test_random_crops_differ_by_number_seed_and_image(self) -> None:
        cropping = Cropping(64, 16, aspect_buckets=False, crop="random", random_crops=8)
        first, second = views_of(samples([(3000, 100)] * 2), [cropping], seed=0)
        assert len({view.box for view in first}) == 8
        assert {view.box for view in first}.isdisjoint(view.box for view in second)
        again, _ = views_of(samples([(3000, 100)] * 2), [cropping], seed=0)
        other, _ = views_of(samples([(3000, 100)] * 2), [cropping], seed=1)
        assert again == first
        assert {view.box for view in first}.isdisjoint(view.box for view in other)

    def test_random_crops_depend_on_the_bytes_not_the_name_or_index(self) -> None:
        cropping = Cropping(64, 16, aspect_buckets=False, crop="random", random_crops=2)
        (sample,) = samples([(3000, 100)])
        moved = replace(sample, index=7, path=Path("elsewhere/b.jpg"), caption="other")
        boxes = [[view.box for view in views_of([one], [cropping], 0)[0]] for one in (sample, moved)]
        assert boxes[0] == boxes[1]

    def test_random_crops_reach_both_ends(self) -> None:
        cropping = Cropping(64, 16, aspect_buckets=False, crop="random", random_crops=400)
        (views,) = views_of(samples([(110, 100)]), [cropping], seed=0)
        assert {view.box[0] for view in views} == set(range(11))

    def test_an_image_of_the_right_aspect_ratio_has_one_crop(self) -> None:
        cropping = Cropping(64, 16, crop="random", random_crops=5, flip=True)
        (views,) = views_of(samples([(128, 128)]), [cropping], seed=0)
        assert [view.flip for view in views] == [False, True]

    def test_enlargement_is_reported(self, caplog: pytest.LogCaptureFixture) -> None:
        views_of(samples([(32, 32), (640, 640)]), [Cropping(64, 16)], seed=0)
        assert "1 of 2 " in caplog.text
        assert "0.png" in caplog.text
        assert "2.0" in caplog.text
        assert "data.resolution" in caplog.text


class TestPlan:
    @pytest.mark.parametrize("global_batch", [1, 2, 3, 8, 20])
    def test_any_start_continues_the_same_run(self, global_batch: int) -> None:
        plan = plan_of(SHAPES, global_batch)
        whole = list(islice(plan.micro_batches(), 200))
        for start in (0, 1, 2, 5, 16, 17, 99, 160):
            assert list(islice(plan.micro_batches(start), 40)) == whole[start : start + 40]

    @settings(deadline=None, max_examples=30)
    @given(
        counts=st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any),
        global_batch=st.integers(1, 12),
        start=st.integers(0, 60),
    )
    def test_any_start_with_any_mixture_of_sizes(
        self, counts: list[int], global_batch: int, start: int
    ) -> None:
        kinds = [(640, 480), (480, 640), (500, 500), (300, 900)]
        shapes = [kind for kind, number in zip(kinds, counts, strict=True) for _ in range(number)]
        plan = plan_of(shapes, global_batch)
        assert list(islice(plan.micro_batches(start), 5)) == list(
            islice(plan.micro_batches(), start, start + 5)
        )

    @pytest.mark.parametrize("global_batch", [1, 3, 20])
    def test_every_sample_is_used_exactly_once_per_epoch(self, global_batch: int) -> None:
        epochs = 60
        stop = epochs * len(SHAPES)
        entries = [e for batch in islice(plan_of(SHAPES, global_batch).micro_batches(), stop) for e in batch]
        seen = {entry.position: entry.view.sample.index for entry in entries}
        assert len(seen) == len(entries), "a position is used once"
        # A sample waits at most until its size has filled a micro-batch, here at most 20 epochs later.
        for epoch in range(epochs - 21 if global_batch > 1 else epochs):
            places = range(epoch * len(SHAPES), (epoch + 1) * len(SHAPES))
            assert sorted(seen[place] for place in places) == list(range(len(SHAPES)))

    def test_samples_of_one_size_keep_the_order_of_the_stream(self) -> None:
        entries = [e for batch in islice(plan_of(SHAPES, 4).micro_batches(), 100) for e in batch]
        for width in {e.view.width for e in entries}:
            positions = [e.position for e in entries if e.view.width == width]
            assert positions == sorted(positions)

    def test_each_epoch_and_seed_has_its_own_order(self) -> None:
        def orders(seed: int) -> list[list[int]]:
            entries = [b[0] for b in islice(plan_of(SHAPES, 1, seed).micro_batches(), 3 * len(SHAPES))]
            indices = [entry.view.sample.index for entry in entries]
            return [indices[n * len(SHAPES) : (n + 1) * len(SHAPES)] for n in range(3)]

        first = orders(0)
        assert first[0] != first[1] != first[2]
        assert orders(0) == first
        assert orders(1) != first

    @pytest.mark.parametrize("global_batch", [2, 5])
    def test_micro_batches_are_full_and_of_one_size(self, global_batch: int) -> None:
        for batch in islice(plan_of(SHAPES, global_batch).micro_batches(), 50):
            assert len(batch) == global_batch
            assert len({(entry.view.width, entry.view.height) for entry in batch}) == 1

    def test_starting_a_million_micro_batches_later(self) -> None:
        plan = plan_of(SHAPES, 20)
        at, after = islice(plan.micro_batches(10**6), 2)
        assert next(plan.micro_batches(10**6 + 1)) == after
        # Square images are 3 of 16 in the stream. The positions show that no micro-batch was skipped.
        assert abs(at[-1].position - 20 * 10**6) < 20 * len(SHAPES) * 20

    def test_views_are_chosen_by_position(self) -> None:
        plan = plan_of([(3000, 100)], 1, aspect_buckets=False, crop="random", random_crops=3, flip=True)
        chosen = Counter(batch[0].view for batch in islice(plan.micro_batches(), 600))
        assert len(chosen) == 6
        assert min(chosen.values()) > 60
        again = [batch[0].view for batch in islice(plan.micro_batches(300), 10)]
        assert again == [batch[0].view for batch in islice(plan.micro_batches(), 300, 310)]


class TestPlannedBatches:
    @staticmethod
    def entries(world_size: int, batch_size: int, start: int = 0) -> list[list[list[Entry]]]:
        plan = plan_of(SHAPES, world_size * batch_size)
        return [
            list(PlannedBatches(plan, rank=rank, processes=world_size, start=start, stop=30))
            for rank in range(world_size)
        ]

    def test_several_processes_train_what_a_single_one_would(self) -> None:
        (single,) = self.entries(world_size=1, batch_size=4)
        for world_size, batch_size in ((2, 2), (4, 1)):
            ranks = self.entries(world_size, batch_size)
            joined = [[entry for share in shares for entry in share] for shares in zip(*ranks, strict=True)]
            assert joined == single

    def test_length_and_resume(self) -> None:
        (whole,) = self.entries(1, 2)
        (rest,) = self.entries(1, 2, start=12)
        assert len(whole) == 30
        assert rest == whole[12:]
        plan = plan_of(SHAPES, 1)
        assert len(PlannedBatches(plan, rank=0, processes=1, start=12, stop=30)) == 18
        assert list(PlannedBatches(plan, rank=0, processes=1, start=30, stop=30)) == []
