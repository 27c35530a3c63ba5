"""Chooses the part and size at which reference images are encoded.

A reference with the proportions of its image shows the same scene: it gets the same crop, scaled to its own pixels, and
the same size, as in diffusers' training script for FLUX.1 Kontext. Any other reference is taken as a whole, at the
bucket closest to its own proportions. It is mirrored if its image is, so that left and right still agree.
"""

from collections.abc import Sequence
from dataclasses import replace

from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.data.views.buckets import Box, Cropping, Size, View, box_in, nearest_size

_PROPORTION = 0.02  # relative difference of the proportions of a reference and its image that counts as none


def with_reference_views(
    groups: Sequence[tuple[View, ...]], cropping: Cropping, resolution: int | None
) -> list[tuple[View, ...]]:
    """Returns groups of views with the views of their samples' references.

    All views of a group have references of the same sizes.

    Args:
        cropping: any of the data set's; another resolution takes its place.
        resolution: of the references, in pixels; None: that of the view.
    """
    return [tuple(_with_references(view, cropping, resolution) for view in group) for group in groups]


def _with_references(view: View, cropping: Cropping, resolution: int | None) -> View:
    own = [_reference(reference, view, cropping, resolution) for reference in view.sample.references]
    return replace(view, references=tuple(own))


def _reference(reference: Sample, view: View, cropping: Cropping, resolution: int | None) -> View:
    side = resolution or view.resolution
    sizes = replace(cropping, resolution=side).sizes()
    sample = view.sample
    ratio = (reference.width * sample.height) / (reference.height * sample.width)
    if abs(ratio - 1) > _PROPORTION:
        size = nearest_size(reference.width, reference.height, sizes)
        box = box_in((0, 0, reference.width, reference.height), size, 0.5, 0.5)
    else:
        size = view.size if side == view.resolution else nearest_size(view.width, view.height, sizes)
        box = _scaled(view.box, (sample.width, sample.height), (reference.width, reference.height))
        if size != view.size:
            box = box_in(box, size, 0.5, 0.5)
    return View(reference, box, *size, view.flip, side)


def _scaled(box: Box, of: Size, to: Size) -> Box:
    """Returns the part of an image of size `to` that corresponds to a box in one of size `of`; at least one pixel."""
    left, right = (round(edge * to[0] / of[0]) for edge in (box[0], box[2]))
    top, bottom = (round(edge * to[1] / of[1]) for edge in (box[1], box[3]))
    left, top = min(left, to[0] - 1), min(top, to[1] - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)
