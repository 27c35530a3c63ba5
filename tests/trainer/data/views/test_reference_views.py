"""Tests of the crops and sizes of reference images, and of batches that hold them."""

from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.data.views.buckets import Cropping, View, views_of
from halfbyte.trainer.data.views.order import OrderedSet, SampleOrder
from halfbyte.trainer.data.views.references import with_reference_views

SIDES = st.integers(8, 400)


def sample(size: tuple[int, int], *references: tuple[int, int], number: int = 0) -> Sample:
    found = tuple(Sample(0, Path(f"r{n}.png"), "", *one, f"{n + 1:064x}") for n, one in enumerate(references))
    return Sample(number, Path("a.png"), "caption", *size, f"{number:064x}", references=found)


def views(samples: list[Sample], cropping: Cropping, resolution: int | None = None) -> list[tuple[View, ...]]:
    return with_reference_views(views_of(samples, [cropping], 0), cropping, resolution)


def test_a_reference_of_the_same_proportions_gets_the_same_crop() -> None:
    cropping = Cropping(64, 16, aspect_buckets=False, crop="random", random_crops=4, flip=True)
    (group,) = views([sample((300, 100), (300, 100), (600, 200))], cropping)
    assert len(group) == 8
    for view in group:
        same, twice = view.references
        assert (same.box, same.size, same.flip) == (view.box, view.size, view.flip)
        assert twice.box == tuple(2 * edge for edge in view.box)
        assert (twice.size, twice.flip) == (view.size, view.flip)


def test_another_reference_is_taken_whole_at_its_own_bucket() -> None:
    cropping = Cropping(64, 16, crop="random", random_crops=3, flip=True)
    (group,) = views([sample((300, 100), (100, 300), (64, 64))], cropping)
    assert {view.sizes for view in group} == {((112, 32), (32, 112), (64, 64))}
    for view in group:
        assert view.references[1].box == (0, 0, 64, 64)
        assert {reference.flip for reference in view.references} == {view.flip}


def test_references_may_have_a_resolution_of_their_own() -> None:
    ((view,),) = views([sample((128, 128), (256, 256), (64, 256))], Cropping(64, 16), resolution=32)
    assert view.sizes == ((64, 64), (32, 32), (16, 64))
    assert view.references[0].box == (0, 0, 256, 256)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(SIDES, SIDES),
    other=st.tuples(SIDES, SIDES),
    crop=st.sampled_from(["center", "random"]),
    resolution=st.sampled_from([None, 32, 64, 128]),
)
def test_boxes_lie_inside_and_groups_have_one_size(size, other, crop, resolution) -> None:
    cropping = Cropping(64, 16, crop=crop, random_crops=1 if crop == "center" else 3, flip=True)
    (group,) = views([sample(size, other, size, (2 * size[0], 2 * size[1]))], cropping, resolution)
    assert len({view.sizes for view in group}) == 1
    for view in group:
        for reference in view.references:
            left, top, right, bottom = reference.box
            assert 0 <= left < right <= reference.sample.width
            assert 0 <= top < bottom <= reference.sample.height
            assert reference.resolution == (resolution or 64)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_batches_hold_references_of_the_same_sizes_and_number(batch: int) -> None:
    kinds = [[(64, 64)], [(64, 64)], [(100, 30)], [], [(64, 64), (64, 64)], [(64, 64)]]
    samples = [sample((64, 64), *kind, number=number) for number, kind in enumerate(kinds)]
    order = SampleOrder([OrderedSet(views(samples, Cropping(64, 16)), 6)], seed=0, global_batch=batch)
    assert len(order.kinds) == 4
    for entries in islice(order.micro_batches(), 40):
        assert len(entries) == batch
        assert len({entry.view.sizes for entry in entries}) == 1
