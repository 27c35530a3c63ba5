"""Tests of the order of samples with a batch size for each resolution, alone and on several processes."""

from collections import Counter, defaultdict
from itertools import islice
from math import lcm
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.trainer.data.batches import PlannedBatches
from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.data.views.buckets import Cropping, views_of
from halfbyte.trainer.data.views.order import Entry, OrderedSet, SampleOrder
from halfbyte.trainer.recipe.batch_sizes import BatchSize, batch_at

RESOLUTIONS = (32, 64, 128)
SHAPES = st.lists(
    st.sampled_from([(40, 40), (64, 48), (70, 70), (140, 130), (300, 130), (130, 300)]),
    min_size=1,
    max_size=10,
)
SETS = st.lists(st.tuples(SHAPES, st.integers(1, 30)), min_size=1, max_size=3)
BATCHES = st.fixed_dictionaries({side: st.integers(1, 6) for side in RESOLUTIONS})
FEW = settings(max_examples=30, deadline=None)


def order_of(sets: list[tuple[list[tuple[int, int]], int]], global_batch: BatchSize) -> SampleOrder:
    built = []
    for number, (shapes, uses) in enumerate(sets):
        samples = [
            Sample(n, Path(f"{number}-{n}.png"), "caption", *shape, f"{number:032x}{n:032x}", data_set=number)
            for n, shape in enumerate(shapes)
        ]
        views = views_of(samples, [Cropping(side, 16) for side in RESOLUTIONS], seed=0)
        built.append(OrderedSet(views, uses))
    return SampleOrder(built, seed=3, global_batch=global_batch)


@FEW
@given(sets=SETS, batch=BATCHES, start=st.integers(0, 60))
def test_starting_anywhere_continues_the_same_order(sets, batch, start) -> None:
    order = order_of(sets, batch)
    assert list(islice(order.micro_batches(start), 15)) == list(
        islice(order.micro_batches(), start, start + 15)
    )


@FEW
@given(sets=SETS, batch=BATCHES)
def test_micro_batches_are_full_and_use_every_sample_once(sets, batch) -> None:
    order = order_of(sets, batch)
    batches = list(islice(order.micro_batches(), 60))
    for entries in batches:
        (side,) = {entry.view.resolution for entry in entries}
        assert len(entries) == batch[side]
        assert len({entry.view.size for entry in entries}) == 1
    positions = [entry.position for entries in batches for entry in entries]
    assert len(set(positions)) == len(positions)
    # What the stream has given and no micro-batch has taken yet waits: less than a batch of each kind.
    waiting = max(positions) + 1 - len(positions)
    assert waiting <= sum(samples - 1 for _, samples in order.kinds)
    # The shares of the sets hold for the stream; each kind delays less than one batch.
    taken = Counter(entry.view.sample.data_set for entries in batches for entry in entries)
    total = sum(uses for _, uses in sets)
    for number, (_, uses) in enumerate(sets):
        assert abs(taken[number] - (max(positions) + 1) * uses / total) < len(sets) + waiting


@FEW
@given(sets=SETS, size=st.integers(1, 5))
def test_equal_batch_sizes_give_the_order_of_one_number(sets, size) -> None:
    mapped, plain = (order_of(sets, batch) for batch in (dict.fromkeys(RESOLUTIONS, size), size))
    assert list(islice(mapped.micro_batches(), 40)) == list(islice(plain.micro_batches(), 40))
    assert mapped.mean_batch == pytest.approx(size)
    assert plain.mean_batch == pytest.approx(size)


@FEW
@given(sets=SETS, batch=BATCHES)
def test_the_mean_batch_is_that_of_a_long_run(sets, batch) -> None:
    order = order_of(sets, batch)
    # A common multiple of passes and batches, after which no sample waits.
    epochs = lcm(*range(1, 7)) * lcm(*(sum(map(len, order._sets[n][0])) for n in range(len(sets))))
    emitted = order._emitted_before(epochs)
    assert epochs * order.epoch_length / emitted == pytest.approx(order.mean_batch, rel=0.05)


def planned(order: SampleOrder, processes: int, accumulation: int, start: int = 0) -> list[list[list[Entry]]]:
    """Returns the micro-batches of each process."""
    return [
        list(
            PlannedBatches(
                order, rank=rank, processes=processes, start=start, stop=24, accumulation=accumulation
            )
        )
        for rank in range(processes)
    ]


@FEW
@given(sets=SETS, batch=BATCHES, accumulation=st.sampled_from([1, 2, 3, 4]))
def test_one_two_and_four_processes_take_the_same_samples(sets, batch, accumulation) -> None:
    order = order_of(sets, {side: 4 * size for side, size in batch.items()})
    (alone,) = planned(order, 1, accumulation)
    for processes in (2, 4):
        ranks = planned(order, processes, accumulation)
        joined = [[entry for part in parts for entry in part] for parts in zip(*ranks, strict=True)]
        assert joined == alone
        assert all(len({len(part) for part in parts}) == 1 for parts in zip(*ranks, strict=True))
    resumed = planned(order, 2, accumulation, start=12)
    assert [list(part) for part in zip(*resumed, strict=True)] == [
        list(part) for part in zip(*planned(order, 2, accumulation), strict=True)
    ][12:]


@FEW
@given(sets=SETS, batch=BATCHES, accumulation=st.sampled_from([1, 2, 3, 4]))
def test_every_sample_of_a_step_has_the_same_weight(sets, batch, accumulation) -> None:
    """A step's gradient is the mean over micro-batches of share x the mean over samples."""
    (alone,) = planned(order_of(sets, batch), 1, accumulation)
    for first in range(0, 24, accumulation):
        step = alone[first : first + accumulation]
        samples = sum(map(len, step))
        for entries in step:
            assert len({entry.share for entry in entries}) == 1
            assert entries[0].share / len(entries) / accumulation == pytest.approx(1 / samples)


def test_equal_micro_batches_have_exactly_the_share_one() -> None:
    order = order_of([([(70, 70)] * 7, 7)], 3)
    (alone,) = planned(order, 1, 3)
    assert {entry.share for entries in alone for entry in entries} == {1.0}


def test_a_resolution_takes_fewer_steps_the_larger_its_batch() -> None:
    order = order_of([([(140, 140)] * 12, 36)], {32: 8, 64: 2, 128: 1})
    counts: defaultdict[int, int] = defaultdict(int)
    for entries in islice(order.micro_batches(), 390):
        counts[entries[0].view.resolution] += 1
    assert [counts[side] * batch_at({32: 8, 64: 2, 128: 1}, side) for side in RESOLUTIONS] == pytest.approx(
        [240] * 3, abs=8
    )
