"""Tests of the order of several data sets: shares, repeats, resuming, and images that are alone in their bucket."""

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.data.views.buckets import Cropping, View, views_of
from halfbyte.trainer.data.views.order import Entry, OrderedSet, SampleOrder

# Per data set: its images as (width, height), and the samples that an epoch takes.
IMAGES = st.lists(st.sampled_from([(640, 480), (480, 640), (500, 500), (300, 900)]), min_size=1, max_size=12)
SETS = st.lists(st.tuples(IMAGES, st.integers(1, 40)), min_size=1, max_size=5)
FEW = settings(max_examples=40, deadline=None)


def ordered(
    number: int, shapes: list[tuple[int, int]], uses: int, resolutions: tuple[int, ...] = (64,)
) -> OrderedSet:
    samples = [
        Sample(n, Path(f"{number}-{n}.png"), "caption", *shape, f"{number:032x}{n:032x}", data_set=number)
        for n, shape in enumerate(shapes)
    ]
    croppings = [Cropping(resolution, 16) for resolution in resolutions]
    return OrderedSet(views_of(samples, croppings, seed=0), uses)


def order_of(sets: list[tuple[list[tuple[int, int]], int]], global_batch: int) -> SampleOrder:
    built = [ordered(number, shapes, uses) for number, (shapes, uses) in enumerate(sets)]
    return SampleOrder(built, seed=3, global_batch=global_batch)


def stream_of(order: SampleOrder, length: int) -> list[Entry]:
    """Returns the first entries of the stream: with one image per micro-batch nothing waits."""
    return [entries[0] for entries in islice(order.micro_batches(), length)]


@FEW
@given(sets=SETS)
def test_sets_keep_their_shares_over_any_part_of_the_run(sets) -> None:
    order, epoch = order_of(sets, 1), sum(uses for _, uses in sets)
    counts: Counter[int] = Counter()
    for number, entry in enumerate(stream_of(order, 2 * epoch), start=1):
        assert entry.position == number - 1
        counts[entry.view.sample.data_set] += 1
        for index, (_, uses) in enumerate(sets):
            assert abs(counts[index] - number * uses / epoch) < len(sets)
    assert counts == {index: 2 * uses for index, (_, uses) in enumerate(sets)}


@FEW
@given(sets=SETS, epochs=st.integers(1, 6))
def test_every_image_is_trained_as_often_as_its_set_says(sets, epochs) -> None:
    order, epoch = order_of(sets, 1), sum(uses for _, uses in sets)
    counts = Counter(entry.view.sample.path for entry in stream_of(order, epochs * epoch))
    for number, (shapes, uses) in enumerate(sets):
        own = [counts[Path(f"{number}-{n}.png")] for n in range(len(shapes))]
        assert sum(own) == epochs * uses
        assert max(own) - min(own) <= 1


@FEW
@given(sets=SETS, global_batch=st.integers(1, 5), start=st.integers(0, 60))
def test_starting_anywhere_continues_the_same_order(sets, global_batch, start) -> None:
    order = order_of(sets, global_batch)
    whole = list(islice(order.micro_batches(), start + 20))
    assert list(islice(order.micro_batches(start), 20)) == whole[start:]


@FEW
@given(sets=SETS, global_batch=st.integers(1, 5))
def test_an_image_alone_in_its_bucket_is_trained_as_often_as_others(sets, global_batch) -> None:
    order, epoch = order_of(sets, global_batch), sum(uses for _, uses in sets)
    batches = list(islice(order.micro_batches(), 30 * epoch // global_batch))
    assert all(len(batch) == global_batch for batch in batches)
    assert all(len({(e.view.width, e.view.height) for e in batch}) == 1 for batch in batches)
    positions = [entry.position for batch in batches for entry in batch]
    assert len(set(positions)) == len(positions)
    # What the stream has given and no micro-batch has taken yet waits: less than a batch of each size.
    waiting = set(range(max(positions) + 1)) - set(positions)
    assert len(waiting) <= len(order.kinds) * (global_batch - 1)


def test_one_set_has_the_order_of_earlier_versions() -> None:
    entries = stream_of(order_of([([(64, 64)] * 6, 6)], 1), 12)
    assert [entry.view.sample.index for entry in entries] == [5, 2, 4, 1, 0, 3, 1, 5, 3, 4, 0, 2]


def test_the_order_of_a_set_does_not_depend_on_later_sets() -> None:
    def of_first(*sets: tuple[list[tuple[int, int]], int]) -> list[Path]:
        entries = stream_of(order_of(list(sets), 1), 60)
        return [e.view.sample.path for e in entries if e.view.sample.data_set == 0]

    alone = of_first(([(64, 64)] * 5, 5))
    beside = of_first(([(64, 64)] * 5, 5), ([(64, 64)] * 3, 9))
    assert beside == alone[: len(beside)]


class TestResolutions:
    SAMPLE = Sample(0, Path("a.png"), "caption", 128, 128, "0" * 64)

    def views(self, width: int, height: int, **options: bool) -> list[tuple[int, int, int]]:
        sample = replace(self.SAMPLE, width=width, height=height)
        groups = views_of([sample], [Cropping(side, 16) for side in (32, 64, 128)], 0, **options)
        views: list[View] = [view for group in groups for view in group]
        return [(view.resolution, view.width, view.height) for view in views]

    def test_an_image_is_trained_at_each_size_for_which_it_is_large_enough(self) -> None:
        assert self.views(128, 128) == [(32, 32, 32), (64, 64, 64), (128, 128, 128)]
        assert self.views(100, 100) == [(32, 32, 32), (64, 64, 64)]
        assert self.views(63, 63) == [(32, 32, 32), (64, 64, 64)]  # enlarged by less than 5 %

    def test_a_small_image_is_enlarged_to_the_smallest_size(self) -> None:
        assert self.views(20, 20) == [(32, 32, 32)]

    def test_only_the_largest_size_on_request(self) -> None:
        assert self.views(100, 100, only_largest=True) == [(64, 64, 64)]
        assert self.views(20, 20, only_largest=True) == [(32, 32, 32)]
