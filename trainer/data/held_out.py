"""Chooses and checks validation images: those on which a run is measured but not trained."""

from collections.abc import Sequence

import numpy

from halfbyte.trainer.data.records.records import digests_of, selected
from halfbyte.trainer.data.records.sample import Sample
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.wording import printable


def set_aside(
    sets: Sequence[Sequence[Sample]],
    count: int,
    *,
    setting: str = "data.path",
    from_sets: Sequence[int] = (0,),
) -> tuple[list[Sequence[Sample]], list[Sequence[Sample]]]:
    """Splits the samples of each set into those to train on and those for validation; all keep their order.

    The choice of `count` images depends only on their SHA-256: it is the same for every seed and does not change when a
    file is renamed. Copies of an image count once and stay in the same part, because a validation image that is also
    trained on measures nothing.

    Args:
        setting: the recipe's field that names the images, for messages.
        from_sets: the data sets from which images may be chosen.

    Raises:
        DataError: if no image would be left to train on.
    """
    digests = [digests_of(samples) for samples in sets]
    contents = numpy.unique(numpy.concatenate([digests[number] for number in from_sets]))
    if count >= len(contents):
        raise DataError(
            f"validation.held_out: got {count}, expected at most {len(contents) - 1}, because {setting} has"
            f" {len(contents)} different images"
        )
    if count == 0:
        return list(sets), [selected(own, numpy.zeros(len(own), bool)) for own in sets]
    chosen = [numpy.isin(own, contents[:count]) for own in digests]
    trained = [selected(own, ~held) for own, held in zip(sets, chosen, strict=True)]
    held_out = [
        selected(own, held if number in from_sets else numpy.zeros(len(own), bool))
        for number, (own, held) in enumerate(zip(sets, chosen, strict=True))
    ]
    return trained, held_out


def refuse_trained(held_out: Sequence[Sample], trained: Sequence[Sample]) -> None:
    """Raises DataError, with one line per image, if held-out images are trained on as well."""
    held, known = digests_of(held_out), digests_of(trained)
    both = numpy.flatnonzero(numpy.isin(held, known)).tolist()
    lines = []
    for place in both:
        twin = trained[int(numpy.flatnonzero(known == held[place])[-1])]
        lines.append(
            f"{printable(held_out[place].path)}: is in validation.path and also trained on, as"
            f" {printable(twin.path)}; remove it from one of them"
        )
    if lines:
        raise DataError("\n".join(lines))
