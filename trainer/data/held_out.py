"""Chooses and checks validation images: those on which a run is measured but not trained."""

from collections.abc import Container, Sequence

from halfbyte.trainer.data.sources.folder import Sample
from halfbyte.trainer.errors import DataError
from halfbyte.trainer.wording import printable


def set_aside(
    samples: Sequence[Sample],
    count: int,
    *,
    setting: str = "data.path",
    from_sets: Container[int] | None = None,
) -> tuple[list[Sample], list[Sample]]:
    """Splits samples into those to train on and `count` for validation; both keep their order.

    The choice depends only on the images' SHA-256: it is the same for every seed and does not change when a file is
    renamed. Copies of an image count once and stay in the same part, because a validation image that is also trained
    on measures nothing.

    Args:
        setting: the recipe's field that names the images, for messages.
        from_sets: the data sets from which images may be chosen; None: all.

    Raises:
        DataError: if no image would be left to train on.
    """
    choice = [sample for sample in samples if from_sets is None or sample.data_set in from_sets]
    contents = sorted({sample.sha256 for sample in choice})
    if count >= len(contents):
        raise DataError(
            f"validation.held_out: got {count}, expected at most {len(contents) - 1}, because {setting} has"
            f" {len(contents)} different images"
        )
    chosen = set(contents[:count])
    return (
        [sample for sample in samples if sample.sha256 not in chosen],
        [sample for sample in choice if sample.sha256 in chosen],
    )


def refuse_trained(held_out: Sequence[Sample], trained: Sequence[Sample]) -> None:
    """Raises DataError, with one line per image, if held-out images are trained on as well."""
    known = {sample.sha256: sample for sample in trained}
    both = [sample for sample in held_out if sample.sha256 in known]
    if both:
        raise DataError(
            "\n".join(
                f"{printable(sample.path)}: is in validation.path and also trained on, as"
                f" {printable(known[sample.sha256].path)}; remove it from one of them"
                for sample in both
            )
        )
